"""Bounds of chunks of keys, by which a query finds those that may matter to it (as in Quest, arXiv 2406.10774), and the choice.

Pure functions on tensors; how high a chunk's bound is for a query: `mixkv.ops.reference.chunk_scores`.
"""

from __future__ import annotations

import torch

# Steps between the smallest and the largest element of a head's keys, to which bounds are rounded.
_STEPS = 15
# Chunks whose bounds are computed at once, at least.
_BLOCK = 64


def of_chunks(
    key: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor, sequence: torch.Tensor, sequences: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The element-wise bounds of chunks of keys, rounded outwards to 16 levels, so that a chunk's take half a byte each.

    Args:
        key: [rows, D].
        starts, rows: int [chunks], where each begins and how many rows it has, 1 to ``chunk``.
        sequence: int64 [chunks], which of ``sequences`` it belongs to.

    Returns: ``(codes, grid)``: uint8 [chunks, D], in the upper four bits the level of the largest element, in the lower that of the
        smallest; float32 [sequences, 2, D], each sequence's lowest level and what lies between one and the next.
    """
    # Some chunks at a time: what is computed in between takes many times the bytes of the codes.
    blocks = torch.arange(starts.numel(), device=key.device).split(max(_BLOCK, starts.numel() // 32))
    offset = torch.arange(chunk, device=key.device)
    low, high = (key.new_empty(starts.numel(), key.shape[1]) for _ in range(2))
    for block in blocks:
        inside = offset.minimum(rows[block].unsqueeze(-1) - 1)
        low[block], high[block] = key[starts[block].unsqueeze(-1) + inside].aminmax(dim=1)
    index = sequence.unsqueeze(-1).expand_as(high)
    lowest = high.new_full((sequences, key.shape[1]), torch.inf).scatter_reduce(0, index, low, "amin").float()
    highest = high.new_full((sequences, key.shape[1]), -torch.inf).scatter_reduce(0, index, high, "amax").float()
    lowest, highest = (part.masked_fill(lowest > highest, 0.0) for part in (lowest, highest))
    # A little wider than the range, so that rounding never puts the largest element above the last level.
    step = (
        (highest - lowest) / _STEPS * (1 + 2**-20) + (lowest.abs() + highest.abs()) * 2**-23 + torch.finfo(torch.float32).tiny
    )
    codes = torch.empty(high.shape, dtype=torch.uint8, device=key.device)
    for block in blocks:
        base, width = lowest[sequence[block]], step[sequence[block]]
        codes[block] = _codes(low[block].float(), high[block].float(), base, width)
    return codes, torch.stack([lowest, step], dim=1)


def _codes(low: torch.Tensor, high: torch.Tensor, base: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """The codes of chunks with elements from ``low`` to ``high``, in levels ``base + n * width``; all float32 [chunks, D]."""
    above = ((high - base) / width).ceil().clamp(0, _STEPS)
    above = (above + (base + above * width < high).float()).clamp(max=_STEPS)
    below = ((low - base) / width).floor().clamp(0, _STEPS)
    below = (below - (base + below * width > low).float()).clamp(min=0)
    return (16 * above + below).to(torch.uint8)


def choose(scores: torch.Tensor, slots: torch.Tensor, most: int) -> torch.Tensor:
    """The chunks with the highest scores.

    Args:
        scores: [S, C], -inf where there is no chunk.
        slots: int [S], how many each sequence chooses; no more than it has.
        most: the largest of them (host).

    Returns: int64 [S, most], -1 beyond a sequence's slots.
    """
    best = scores.topk(most, dim=-1).indices
    return best.masked_fill(torch.arange(most, device=scores.device) >= slots.unsqueeze(-1), -1)


def marked(chosen: torch.Tensor, chunks: int) -> torch.Tensor:
    """Which of so many ``chunks`` are among ``chosen``, int64 [..., most] with -1 for none: bool [..., chunks]."""
    marks = torch.zeros(*chosen.shape[:-1], chunks + 1, dtype=torch.bool, device=chosen.device)
    return marks.scatter_(-1, chosen.where(chosen >= 0, chunks), True)[..., :chunks]
