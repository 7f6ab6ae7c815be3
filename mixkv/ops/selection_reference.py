"""What a head keeps, by rank, in plain torch: the ground truth for the compiled operations, equal to the bit, and the fallback."""

from __future__ import annotations

import torch

from .reference import flat_rows


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


def rows_below(
    starts: torch.Tensor, lengths: torch.Tensor, ranks: torch.Tensor, quota: torch.Tensor, tail: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of a store whose rank is below their sequence's quota, and the last ``tail`` rows of every sequence.

    Args:
        starts, lengths: int32 [S], where the sequences lie.
        ranks: int32 [rows without tails], sequence after sequence.
        quota: int64 [S].

    Returns: rows int32 [kept], sequence after sequence; int64 [S], how many of each; and the ranks that were below, int32.
    """
    lengths = lengths.long()
    below = ranks < quota.repeat_interleave(lengths - tail, output_size=ranks.numel())
    keep, ends, total = below, lengths.cumsum(0), ranks.numel() + tail * lengths.numel()
    if tail:
        place = torch.arange(total, device=ranks.device) - (ends - lengths).repeat_interleave(lengths)
        keep = torch.ones(total, dtype=torch.bool, device=ranks.device)
        keep[place < (lengths - tail).repeat_interleave(lengths)] = below
    before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    rows = flat_rows(starts, lengths, total)[keep]
    return rows.to(torch.int32), before[ends] - before[ends - lengths], ranks[below]


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
