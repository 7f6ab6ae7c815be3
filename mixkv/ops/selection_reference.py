"""What a head keeps, by rank, in plain torch: the ground truth for the compiled operations, equal to the bit, and the fallback."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from . import row_access, row_codes
from .arguments import RaggedBuffers
from .layout import empty_buffers, spare_per_sequence
from .reference import compact
from .row_access import flat_rows


def places(score: torch.Tensor) -> torch.Tensor:
    """Int32 [B, Hkv, M]: the place of each candidate of a head by ``score`` [B, Hkv, M], largest first.

    Equal scores, which max pooling makes, go to whichever `torch.sort` puts first, as in the authors' implementation.
    """
    order = score.sort(dim=-1, descending=True).indices
    numbers = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device).expand_as(order)
    return torch.empty(order.shape, dtype=torch.int32, device=order.device).scatter_(-1, order, numbers)


def ada_counts(importance: torch.Tensor, base: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """How many of the most important candidates of all heads belong to each (AdaKV, arXiv 2407.11550, algorithm 1).

    Each candidate is weighted by the share of importance in its head's ``base`` most important.

    Args:
        importance: float32 [B, Hkv, M], -inf for padding.
        base: int64 [B].
        totals: int64 [B], how many candidates are counted.

    Returns: int64 [B, Hkv].
    """
    batch, heads, length = importance.shape
    device = importance.device
    real = importance.clamp(min=0)
    top = real.topk(min(int(base.max()), length), dim=-1).values
    in_top = torch.arange(top.shape[-1], device=device) < base.to(device).view(-1, 1, 1)
    concentration = (top * in_top).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1e-30)
    weighted = (real * concentration).masked_fill(importance.isneginf(), -1.0)
    most = min(int(totals.max()), heads * length)
    owners = weighted.flatten(1).topk(most, dim=-1).indices // length
    counted = (torch.arange(most, device=device) < totals.to(device)[:, None]).long()
    return torch.zeros(batch, heads, dtype=torch.long, device=device).scatter_add_(1, owners, counted)


def take(
    ranks: torch.Tensor, entries: torch.Tensor, window: torch.Tensor | None, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keeps each head's best candidates and its window.

    Args:
        ranks: int32 [B, Hkv, M], of each candidate within its head.
        entries: int64 [B, Hkv], candidates with a rank below are kept.
        window: bool, broadcasts to [B, Hkv, W]: the window's real tokens; None: all of them.
        width: W.

    Returns: positions int32 [kept], head by head and ascending within a head; their ranks int32 [kept], -1 in the window;
        and int64 [B, Hkv], how many each head keeps.
    """
    batch, heads, _ = ranks.shape
    window = torch.ones(1, 1, 1, dtype=torch.bool, device=ranks.device) if window is None else window
    fixed = window.expand(batch, heads, width)
    whole = torch.cat([ranks, torch.full_like(fixed, -1, dtype=torch.int32)], dim=-1)
    keep = torch.cat([ranks < entries.unsqueeze(-1), fixed], dim=-1)
    return keep.nonzero()[:, 2].to(torch.int32), whole[keep], keep.sum(dim=-1)


def gather(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    *,
    codes: bool = False,
    rotate: bool = False,
    pack: bool = False,
) -> RaggedBuffers:
    """New buffers with the kept rows of full keys and values.

    Args:
        key, value: [B, Hkv, N, D], [B, Hkv, N, Dv].
        positions: int32 [kept], the kept positions, sequence after sequence.
        counts: int64 [B, Hkv], how many of each.
        codes: the new rows are in codes, int8 unless ``pack``.
        rotate: they are rotated first, see `row_codes.rotated`.
        pack: they are in 4 bits.
    """
    total = positions.numel()
    if rotate:
        sequence = torch.arange(counts.numel(), device=key.device).repeat_interleave(counts.flatten(), output_size=total)
        place = (sequence // key.shape[1], sequence % key.shape[1], positions.long())
        turned = [row_codes.rotated(part[place].float()) for part in (key, value)]
        like = tuple(part.new_empty(0, part.shape[1] // 2, dtype=torch.uint8) if pack else part for part in turned)
        spare = spare_per_sequence(total, counts.numel())
        buffers = empty_buffers(counts.flatten(), total, spare, like, codes=not pack)
        rows = flat_rows(buffers.starts, buffers.lengths, total)
        row_access.write_rows(buffers, rows, *turned)
        buffers.position[rows] = positions
        return buffers
    buffers = empty_buffers(counts.flatten(), total, spare_per_sequence(total, counts.numel()), (key, value), codes=codes)
    compact(buffers, key, value, positions)
    return buffers


def evict(buffers: RaggedBuffers, ranks: torch.Tensor, quota: torch.Tensor, tail: int) -> tuple[RaggedBuffers, torch.Tensor]:
    """Keeps the rows whose rank is below their sequence's quota, and the last ``tail`` rows of every sequence.

    Args:
        buffers: not changed.
        ranks: int32 [rows without tails], sequence after sequence.
        quota: int64 [S].

    Returns: new buffers, and the ranks that were below, int32.
    """
    lengths = buffers.lengths.long()
    below = ranks < quota.repeat_interleave(lengths - tail, output_size=ranks.numel())
    keep, ends, total = below, lengths.cumsum(0), ranks.numel() + tail * lengths.numel()
    if tail:
        place = torch.arange(total, device=ranks.device) - (ends - lengths).repeat_interleave(lengths)
        keep = torch.ones(total, dtype=torch.bool, device=ranks.device)
        keep[place < (lengths - tail).repeat_interleave(lengths)] = below
    before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    rows = flat_rows(buffers.starts, buffers.lengths, total)[keep]
    left = rows.numel()
    new = empty_buffers(before[ends] - before[ends - lengths], left, spare_per_sequence(left, lengths.numel()), buffers.rows)
    to_rows = flat_rows(new.starts, new.lengths, left)
    for buffer, part in zip(new.rows, buffers.rows):
        buffer.index_copy_(0, to_rows, part.index_select(0, rows))
    return new, ranks[below]


# Of `merge_largest`'s ``least``: parts of a row.
LEAST_UNIT = 1 << 20


class Largest(NamedTuple):
    """The largest numbers of the layers so far, and what follows for their heads.

    Attributes:
        value: float32 [B, n], in order.
        owner: int32 [B, n], the head of each.
        counts: int64 [B, heads so far], how many belong to each head.
        within: int64 [B, heads so far], how many of its own layer's largest do.
        bound: int64 [B, heads so far] on the CPU, rows that each head gets at most.
    """

    value: torch.Tensor
    owner: torch.Tensor
    counts: torch.Tensor
    within: torch.Tensor
    bound: torch.Tensor


def merge_largest(
    so_far: Largest,
    importance: torch.Tensor,
    own_totals: torch.Tensor,
    totals: torch.Tensor,
    base: torch.Tensor,
    candidates: torch.Tensor,
    least: torch.Tensor,
    limit: torch.Tensor,
    floor: float,
) -> Largest:
    """The largest numbers of several layers, with those of one more; of equal ones, the first.

    Args:
        so_far: of the layers before.
        importance: float32 [B, Hkv, M], of one more layer; -inf does not count.
        own_totals: int64 [B] on the CPU, for every batch row, how many of the layer's own largest are counted.
        totals: int64 [B] on the CPU, for every batch row, how many of the largest of all layers are counted.
        base: int64 [B] on the CPU, rows per head on average.
        candidates: int64 [B] on the CPU, candidates per head on average.
        least: int64 [B, heads of all layers] on the CPU, what each head gets for certain, in units of ``1 / LEAST_UNIT`` rows.
        limit: int64 [B, heads of all layers] on the CPU. A head gets at most so many rows, and at most the whole rows of
            ``(1 - floor) * ((candidates - base) * counts + base * within) / candidates + least`` and one more.
        floor: see `mixkv.selection.global_topk.GlobalTopK`.
    """
    batch, heads, _ = importance.shape
    earlier, most = so_far.within.shape[1], int(totals.max())
    new = torch.arange(earlier, earlier + heads, dtype=torch.int32, device=importance.device)
    added = importance.flatten(1)
    mine = (largest(added, own_totals.tolist()) & ~added.isneginf()).view_as(importance).sum(dim=-1)
    value = torch.cat([so_far.value, added], dim=1)
    owner = torch.cat([so_far.owner, new.view(1, heads, 1).expand_as(importance).flatten(1)], dim=1)
    if most < value.shape[1]:
        stay = largest(value, [most] * batch).flatten().nonzero().squeeze(-1)
        value, owner = (part.flatten()[stay].view(batch, -1) for part in (value, owner))
    counted = largest(value, totals.tolist()) & ~value.isneginf()
    counts = torch.zeros(batch, earlier + heads, dtype=torch.long, device=value.device)
    counts = counts.scatter_add_(1, owner.long(), counted.long())
    within = torch.cat([so_far.within, mine], dim=1)
    of_all, of_own = torch.stack([counts, within]).cpu()
    # In numpy: some devices have no float64.
    mean, longest = base.unsqueeze(-1).numpy(), candidates.unsqueeze(-1).numpy()
    shares = ((longest - mean) * of_all.numpy() + mean * of_own.numpy()) * ((1 - floor) / longest.clip(min=1))
    certain = least[:, : earlier + heads].numpy() / LEAST_UNIT
    bound = torch.from_numpy((shares + certain + 2e-6).astype(np.int64) + 1)
    return Largest(value, owner, counts, within, bound.minimum(limit[:, : earlier + heads]))


def largest(value: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Bool [B, n], True for the ``counts`` [B] largest of each row of ``value`` [B, n] float32; of equal ones, the first."""
    size = value.shape[1]
    if min(counts) >= size:
        return torch.ones_like(value, dtype=torch.bool)
    ranked = [min(max(count, 1), size) for count in counts]
    if len(set(ranked)) == 1:
        bound = value.topk(ranked[0], sorted=False).values.amin(dim=1, keepdim=True)
    else:
        bound = torch.stack([row.topk(rank, sorted=False).values.amin(0, keepdim=True) for row, rank in zip(value, ranked)])
    count = torch.tensor(counts, device=value.device).unsqueeze(-1)
    above = value > bound
    tied = value == bound
    return (above | tied) & (above.sum(dim=-1, keepdim=True) + tied.cumsum(dim=-1) * tied <= count)
