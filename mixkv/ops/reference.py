"""The operations on ragged storage in plain torch: the ground truth for every other back end, and the fallback.

A store is `RaggedBuffers`: S = B * Hkv sequences in flat buffers. The host knows an upper bound of their lengths
(``max_length``) and, where all sequences have the same length and capacity, the capacity (``stride``). No function here
synchronises with the device in a decode step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .arguments import ChosenChunks, LogitOptions, Packed, RaggedBuffers
from .row_access import flat_rows, read_rows, write_rows
from .row_codes import rotated, rotated_back
from .sequence_rows import seen_or_hidden, sequence_rows

# Queries attended at once by `attend_extend`: bounds its mask and logits at this many rows per prefix row.
_EXTEND_BLOCK = 256


def append(
    buffers: RaggedBuffers,
    key: torch.Tensor,
    value: torch.Tensor,
    position: int,
    valid: torch.Tensor | None = None,
) -> None:
    """Writes n new rows to the end of every sequence and raises its length, in place. There must be spare rows for them.

    Args:
        buffers: written, ``lengths`` included.
        key, value: [B, Hkv, n, D], [B, Hkv, n, Dv].
        position: of the first new row's token; the others follow.
        valid: bool [B, n]; rows that are not valid (padding) are left out. None: all are valid.
    """
    batch, heads, new, _ = key.shape
    lengths = buffers.lengths
    ends = sequence_rows(buffers.starts, 0).starts + lengths
    if valid is None and new == 1:
        write_rows(buffers, ends, key.reshape(batch * heads, -1), value.reshape(batch * heads, -1))
        buffers.position.index_fill_(0, ends, position)
        lengths.add_(1)
        return
    positions = torch.arange(position, position + new, dtype=torch.int32, device=key.device)
    if valid is None:
        rows = (ends.unsqueeze(1) + torch.arange(new, device=key.device)).flatten()
        write_rows(buffers, rows, key.reshape(batch * heads * new, -1), value.reshape(batch * heads * new, -1))
        buffers.position.index_copy_(0, rows, positions.repeat(batch * heads))
        lengths.add_(new)
        return
    offsets = valid.cumsum(dim=-1) - 1
    taken = valid.unsqueeze(1).expand(batch, heads, new)
    rows = (ends.view(batch, heads, 1) + offsets.unsqueeze(1))[taken]
    write_rows(buffers, rows, key[taken], value[taken])
    buffers.position.index_copy_(0, rows, positions.expand(batch, heads, new)[taken])
    lengths.add_(valid.sum(dim=-1, dtype=torch.int32).repeat_interleave(heads))


def attend(
    query: torch.Tensor,
    buffers: RaggedBuffers,
    logits: LogitOptions,
    *,
    max_length: int,
    stride: int | None,
    packed: Packed | None = None,
) -> torch.Tensor:
    """Decode attention: one query position per batch row over its KV heads' sequences.

    Args:
        query: [B, Hq, 1, D].
        buffers: the store.
        logits: as in the model.
        max_length: at least ``lengths.max()``; exactly the common length where ``stride`` is given.
        stride: the common capacity where all sequences have one length and lie ``stride`` rows apart, else None.
        packed: rows in 4 bits that belong to the sequences too.

    Returns: [B, 1, Hq, Dv], in query's dtype.
    """
    batch, query_heads, _, size = query.shape
    heads = buffers.starts.numel() // batch
    folded = query.reshape(batch, heads, query_heads // heads, size)
    keys, values, mask = _all_padded(buffers, packed, max_length, stride, batch)
    mask = mask if mask is None else mask.unsqueeze(2)
    out = _attention(folded, keys, values, mask, logits)
    return out.reshape(batch, 1, query_heads, -1)


def append_attend(
    query: torch.Tensor,
    buffers: RaggedBuffers,
    key: torch.Tensor,
    value: torch.Tensor,
    position: int,
    logits: LogitOptions,
    *,
    max_length: int,
    stride: int | None,
    packed: Packed | None = None,
    rotate: bool = False,
) -> torch.Tensor:
    """`append` of rows ``key`` [B, Hkv, n, D], ``value`` [B, Hkv, n, Dv] and then `attend`; ``max_length`` counts the new rows.

    With ``rotate`` the stored rows are rotated: query, key and value are rotated first, and the output is rotated back.
    """
    if rotate:
        turned, key, value = (rotated(part.float()) for part in (query, key, value))
        append(buffers, key, value, position)
        output = attend(turned, buffers, logits, max_length=max_length, stride=stride, packed=packed)
        return rotated_back(output).to(query.dtype)
    append(buffers, key, value, position)
    return attend(query, buffers, logits, max_length=max_length, stride=stride, packed=packed)


def chunk_scores(
    query: torch.Tensor, codes: torch.Tensor, grid: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor, *, longest: int
) -> torch.Tensor:
    """What no key of a chunk can exceed: ``sum_d max(q_d low_d, q_d high_d)``, the largest over the G query heads.

    Args:
        query: [B, Hq, 1, D].
        codes: uint8 [chunks, D], `bounds.of_chunks`: the levels of the largest (upper half) and the smallest elements.
        grid: float32 [S, 2, D], each sequence's lowest level and the width of a step.
        starts, counts: int32 [S], each sequence's first chunk and how many it has.
        longest: at least ``counts.max()``.

    Returns: float32 [S, longest], -inf beyond a sequence's chunks.
    """
    sequences, size = starts.numel(), query.shape[-1]
    folded = query.reshape(sequences, -1, size).to(torch.promote_types(query.dtype, torch.float32))
    places = torch.arange(longest, device=starts.device)
    seen = places < counts.unsqueeze(1)
    chunks = (starts.unsqueeze(1) + places).clamp_(max=codes.shape[0] - 1)
    held = codes[chunks]
    steps = folded * grid[:, 1:]
    sides = torch.cat([steps.clamp(min=0), steps.clamp(max=0)], dim=-1)
    levels = torch.cat([held >> 4, held & 15], dim=-1).to(sides.dtype)
    found = sides @ levels.transpose(-1, -2) + (folded * grid[:, :1]).sum(dim=-1, keepdim=True)
    return found.amax(dim=1).masked_fill(~seen, -torch.inf)


def attend_chunks(
    query: torch.Tensor, buffers: RaggedBuffers, chunks: ChosenChunks, logits: LogitOptions, *, max_length: int
) -> torch.Tensor:
    """Decode attention over each sequence's stored rows and chosen chunks of rows that lie elsewhere.

    Args:
        query, buffers, logits, max_length: as in `attend`.
        chunks: up to K a sequence.

    Returns: [B, 1, Hq, Dv], in query's dtype.
    """
    batch, query_heads, _, size = query.shape
    heads = buffers.starts.numel() // batch
    keys, values, mask = _padded(buffers, max_length, None, batch)
    offsets = torch.arange(chunks.size, dtype=torch.int32, device=query.device)
    seen = (offsets < chunks.lengths.unsqueeze(-1)).view(batch, heads, -1)
    rows = (chunks.starts.unsqueeze(-1) + offsets).clamp_(0, chunks.key.shape[0] - 1).flatten()
    keys = torch.cat([keys, chunks.key.index_select(0, rows).view(batch, heads, -1, size)], dim=2)
    values = torch.cat([values, chunks.value.index_select(0, rows).view(batch, heads, -1, values.shape[-1])], dim=2)
    mask = torch.cat([mask, seen], dim=-1).unsqueeze(2)
    folded = query.reshape(batch, heads, query_heads // heads, size)
    out = _attention(folded, keys, values, mask, logits)
    return out.reshape(batch, 1, query_heads, -1)


def fetch_chunks(
    buffers: tuple[torch.Tensor, torch.Tensor],
    from_buffers: tuple[torch.Tensor, torch.Tensor],
    from_rows: torch.Tensor,
    to_rows: torch.Tensor,
    rows: torch.Tensor,
    *,
    chunk: int,
) -> None:
    """Copies chunks of rows between buffers, from the host's memory to a GPU for one. Then it waits to know which.

    Args:
        buffers: ``(key, value)``, written.
        from_buffers: ``(key, value)``.
        from_rows, to_rows, rows: int32 [S, K], where each chunk lies, where it goes, and how many rows it has (0: none).
        chunk: at least ``rows.max()``.
    """
    places = torch.arange(chunk, dtype=torch.int32, device=rows.device)
    real = places < rows.unsqueeze(-1)
    source, target = ((part.unsqueeze(-1) + places)[real] for part in (from_rows, to_rows))
    source = source.to(from_buffers[0].device)
    for to, part in zip(buffers, from_buffers):
        taken = part.new_empty(source.numel(), part.shape[1], pin_memory=part.is_pinned())
        torch.index_select(part, 0, source, out=taken)
        to.index_copy_(0, target.long(), taken.to(to.device, non_blocking=True))


def attend_extend(
    query: torch.Tensor,
    buffers: RaggedBuffers,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    logits: LogitOptions,
    *,
    mask: torch.Tensor | None,
    max_length: int,
    stride: int | None,
    packed: Packed | None = None,
) -> torch.Tensor:
    """Attention of n new positions over [stored sequence | new block]; the new block is not stored yet.

    Every query sees its whole stored sequence; the new block is causal: query i sees new rows 0..i.

    Args:
        query: [B, Hq, n, D].
        buffers, logits, max_length, stride, packed: as in `attend`.
        new_key, new_value: [B, Hkv, n, D], [B, Hkv, n, Dv].
        mask: bool [B or 1, 1, n, n], True where a query sees a new row, in place of the causal mask.

    Returns: [B, n, Hq, Dv], in query's dtype.
    """
    batch, query_heads, new, size = query.shape
    heads = new_key.shape[1]
    groups = query_heads // heads
    keys, values, stored = _all_padded(buffers, packed, max_length, stride, batch)
    if stored is None:
        stored = torch.ones(1, 1, 1, dtype=torch.bool, device=query.device)
    stored = stored.expand(batch, heads, keys.shape[2])
    keys, values = torch.cat([keys, new_key], dim=2), torch.cat([values, new_value], dim=2)
    if mask is None:
        mask = torch.ones(new, new, dtype=torch.bool, device=query.device).tril().view(1, 1, new, new)
    out = query.new_empty(batch, new, query_heads, new_value.shape[-1])
    for first in range(0, new, _EXTEND_BLOCK):
        block = slice(first, min(first + _EXTEND_BLOCK, new))
        rows = block.stop - first
        folded = query[:, :, block].reshape(batch, heads, groups * rows, size)
        seen = torch.cat(
            [
                stored.unsqueeze(2).expand(batch, heads, rows, -1),
                mask[:, :, block].expand(batch, heads, rows, new),
            ],
            dim=-1,
        )
        seen = seen.unsqueeze(2).expand(-1, -1, groups, -1, -1).reshape(batch, heads, groups * rows, -1)
        part = _attention(folded, keys, values, seen, logits)
        out[:, block] = part.view(batch, query_heads, rows, -1).transpose(1, 2)
    return out


def compact(buffers: RaggedBuffers, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> None:
    """Gathers the kept rows of full keys and values into flat storage.

    Args:
        buffers: written; ``starts`` and ``lengths`` say where.
        key, value: [B, Hkv, N, D], [B, Hkv, N, Dv].
        positions: int32 [lengths.sum()], the kept positions, sequence after sequence.
    """
    total, lengths = positions.numel(), buffers.lengths
    sequence = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths.long(), output_size=total)
    row, head = sequence // key.shape[1], sequence % key.shape[1]
    rows, kept = flat_rows(buffers.starts, lengths, total), positions.long()
    write_rows(buffers, rows, key[row, head, kept], value[row, head, kept])
    buffers.position.index_copy_(0, rows, positions)


def move_rows(buffers: RaggedBuffers, source: RaggedBuffers, *, total: int) -> None:
    """Copies sequences between buffers: growth, and taking batch rows (``source`` may repeat or leave out sequences).

    Sequence s of ``buffers`` becomes the ``buffers.lengths[s]`` rows of ``source`` from ``source.starts[s]`` on. The buffers
    must not overlap.

    Args:
        buffers: written; ``starts`` and ``lengths`` say where.
        source: read; its lengths are not used.
        total: ``buffers.lengths.sum()`` (host).
    """
    lengths = buffers.lengths
    rows, from_rows = flat_rows(buffers.starts, lengths, total), flat_rows(source.starts, lengths, total)
    for buffer, part in zip(buffers.rows, source.rows):
        buffer.index_copy_(0, rows, part.index_select(0, from_rows))


def _padded(
    buffers: RaggedBuffers, max_length: int, stride: int | None, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sequences side by side: [B, Hkv, max_length, D], [.., Dv] and, unless all are of that length, the bool mask [B, Hkv, max_length].

    Rows in codes are dequantised to float32.
    """
    key, value, starts, lengths = buffers.key, buffers.value, buffers.starts, buffers.lengths
    heads = starts.numel() // batch
    if stride is not None and buffers.key_scale is None:
        shape = (batch, heads, stride, -1)
        return key.view(shape)[:, :, :max_length], value.view(shape)[:, :, :max_length], None
    known = sequence_rows(starts, max_length, key.shape[0])
    shape = (batch, heads, max_length, -1)
    mask = (known.offsets[:max_length] < lengths.unsqueeze(1)).view(batch, heads, max_length)
    key, value = (part.view(shape) for part in read_rows(buffers, known.rows[:, :max_length].flatten()))
    return key, value, mask


def _all_padded(
    buffers: RaggedBuffers, packed: Packed | None, max_length: int, stride: int | None, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`_padded` with the packed rows before the store's own."""
    if packed is None:
        return _padded(buffers, max_length, stride, batch)
    parts = zip(_padded(packed.buffers, packed.max_length, None, batch), _padded(buffers, max_length, None, batch))
    key, value, mask = (torch.cat(part, dim=2) for part in parts)
    return key, value, mask


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: LogitOptions,
) -> torch.Tensor:
    """[B, Hkv, R, D] queries, R = G * rows (head-major), over [B, Hkv, L, D]; the mask is bool and broadcasts to [B, Hkv, R, L]."""
    softcap, sinks = options.softcap, options.sinks
    if key.dtype != query.dtype:
        # Rows that were dequantised are in float32.
        wide = torch.promote_types(query.dtype, key.dtype)
        return _attention(query.to(wide), key.to(wide), value.to(wide), mask, options).to(query.dtype)
    if softcap is None and sinks is None:
        bias = None if mask is None else torch.where(mask, *seen_or_hidden(query.dtype, query.device))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=options.scaling)
    logits = (query.float() * options.scaling) @ key.float().transpose(-1, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        batch, heads, rows, _ = logits.shape
        groups = sinks.numel() // heads
        column = sinks.float().view(1, heads, groups, 1).expand(batch, -1, -1, rows // groups)
        logits = torch.cat([logits, column.reshape(batch, heads, rows, 1)], dim=-1)
    mass = logits.softmax(dim=-1)[..., : key.shape[2]]
    return (mass @ value.float()).to(query.dtype)
