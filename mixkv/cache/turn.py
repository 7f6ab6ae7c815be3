"""Turn: the tokens of a later turn that are compressed together."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Turn:
    """Tokens ``first`` to ``end`` (excluded), which are compressed together once the last of them has been read.

    ``real``: for every batch row, real tokens of it that have been read; None before its first forward. ``new``: of the present
    forward.
    """

    first: int
    end: int
    real: list[int] | None = None
    new: list[int] | None = None

    def count(self, batch: int, tokens: int, valid: torch.Tensor | None) -> None:
        """So many tokens of the turn have been read, ``valid`` [B, tokens] of them real; None: all."""
        self.new = [tokens] * batch if valid is None else valid.sum(dim=-1).tolist()
        self.real = self.new if self.real is None else [before + more for before, more in zip(self.real, self.new)]

    def take_rows(self, rows: list[int]) -> None:
        self.real = None if self.real is None else [self.real[row] for row in rows]
