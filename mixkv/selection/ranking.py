"""Ranking and Selection: the candidates of a layer in order, and the positions that each KV head keeps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ..ops import dispatch

# The rank of a token that is kept whatever is asked for.
KEPT = -1


@dataclass(frozen=True)
class Selection:
    """What `select` keeps of a prompt of N tokens, in B batch rows and Hkv KV heads.

    Attributes:
        flat_positions: int32 [sum of lengths], the kept positions of all heads one after the other (row by row, head by
            head), ascending within a head.
        flat_ranks: int32 [sum of lengths], the rank of each among its head's candidates, best first: 0, 1, ...; `KEPT` in the
            window and where only later tokens are candidates.
        lengths: int64 [B, Hkv], positions kept, window included.
        redundancy: float32 [B, Hkv], as used by the ``mix`` scores.
        scores: float32 [B, Hkv, M], the candidates' scores, -inf for padding; M = N - window.
    """

    flat_positions: torch.Tensor
    flat_ranks: torch.Tensor
    lengths: torch.Tensor
    redundancy: torch.Tensor
    scores: torch.Tensor

    @property
    def positions(self) -> list[list[torch.Tensor]]:
        """``[B][Hkv]`` int32 tensors: the kept positions, ascending."""
        return split_positions(self.flat_positions, self.lengths)


@dataclass(frozen=True)
class Ranking:
    """A layer's candidates in order, before the budget is allocated.

    Attributes:
        ranks: int32 [B, Hkv, M], each candidate's rank within its head, best first; `KEPT` for tokens before the first candidate.
        importance: float32 [B, Hkv, M], by which a method may allocate the budget to heads; -inf for padding.
        base: int64 [B], candidates kept per head on average.
        real: int64 [B, Hkv], real tokens.
        choosable: int64 [B, Hkv], candidates among them.
        window: bool, broadcasts to [B, Hkv, W], the window's real tokens; None: all of them.
        width: W.
        redundancy, scores: as in `Selection`.
    """

    ranks: torch.Tensor
    importance: torch.Tensor
    base: torch.Tensor
    real: torch.Tensor
    choosable: torch.Tensor
    window: torch.Tensor | None
    width: int
    redundancy: torch.Tensor
    scores: torch.Tensor

    def for_heads(self, importance: torch.Tensor, real: torch.Tensor, newest: torch.Tensor | None = None) -> Ranking:
        """With the ``importance`` [B, all heads, M] and ``real`` [B, all heads] of all heads of the layer, for `allocate`.

        ``newest``: as `rank` was given it.
        """
        candidates = real if newest is None else real.minimum(newest.unsqueeze(-1))
        choosable = (candidates - self.width).clamp(min=0)
        return dataclasses.replace(self, importance=importance, real=real, choosable=choosable)

    def take(self, entries: torch.Tensor) -> Selection:
        """Keeps the window and the best ``entries`` [B, Hkv] candidates of each head."""
        positions, ranks, lengths = dispatch.take(self.ranks, entries, self.window, self.width)
        return Selection(positions, ranks, lengths, self.redundancy, self.scores)


def split_positions(flat: torch.Tensor, lengths: torch.Tensor) -> list[list[torch.Tensor]]:
    """One flat tensor of positions as [B][Hkv] tensors of ``lengths`` [B, Hkv]."""
    parts = iter(flat.split(lengths.flatten().tolist()))
    return [[next(parts) for _ in row] for row in lengths]
