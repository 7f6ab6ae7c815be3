"""What rows were worth when they were read, and at earlier evictions: parts of a layer beside its rows."""

from __future__ import annotations

from typing import Any

import torch

from ..config import MixKVConfig

Tensors = dict[str, torch.Tensor]
Numbers = dict[str, Any]

_NAMES = ("running_position", "running_score", "running_importance")


class RowScores:
    """Scores of rows from when they were read, where they are not measured again.

    ``position`` int32 [B, Hkv, N], ascending, -1 where there is no row; ``score`` float32 [B, Hkv, N].
    """

    def __init__(self, position: torch.Tensor, score: torch.Tensor):
        self.position, self.score = position.contiguous(), score

    def of(self, position: torch.Tensor) -> torch.Tensor:
        """The scores [B, Hkv, n] of the rows at ``position`` int32 [B, Hkv, n]; 0 for those that have none."""
        found = torch.searchsorted(self.position, position.contiguous()).clamp(max=self.position.shape[2] - 1)
        return self.score.gather(2, found).masked_fill((self.position.gather(2, found) != position) | (position < 0), 0.0)

    @property
    def nbytes(self) -> int:
        return self.position.nbytes + self.score.nbytes

    def take_rows(self, rows: list[int]) -> None:
        self.position, self.score = self.position[rows], self.score[rows]

    def state(self) -> tuple[Tensors, Numbers]:
        return {"scored_position": self.position, "row_score": self.score}, {}

    @classmethod
    def restore(cls, tensors: Tensors, numbers: Numbers, config: MixKVConfig, dtype: torch.dtype) -> RowScores | None:
        return cls(tensors["scored_position"], tensors["row_score"]) if "row_score" in tensors else None


class RunningImportance:
    """Means of the scores and of the importance of a layer's rows over the evictions of a generation, decaying.

    Attributes:
        position: int32 [B, Hkv, N], ascending, of the rows that were candidates at the last eviction; -1 where there is none.
        score, importance: float32 [B, Hkv, N]; 0 where a row has not been scored.
    """

    def __init__(self, position: torch.Tensor, score: torch.Tensor, importance: torch.Tensor):
        self.position, self.score, self.importance = position, score, importance

    @classmethod
    def empty(cls, batch: int, heads: int, device: torch.device) -> RunningImportance:
        none = torch.zeros(batch, heads, 1, device=device)
        return cls(torch.full_like(none, -1, dtype=torch.int32), none, none.clone())

    def revise(
        self, position: torch.Tensor, changed: torch.Tensor, decay: float, score: torch.Tensor, importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes in what the last queries say of the candidates, and returns the means.

        Args:
            position: int32 [B, Hkv, M], ascending, -1 where there is no row.
            changed: bool [B], batch rows of which something is evicted; the others keep their means.
            decay: weight of the mean so far.
            score, importance: float32 [B, Hkv, M], -inf where there is no row.
        """
        means = []
        for before, now in ((self.score, score), (self.importance, importance)):
            held = RowScores(self.position, before).of(position)
            mean = torch.where(held > 0, decay * held + (1 - decay) * now, now)
            means.append(mean.where(changed.view(-1, 1, 1), held).clamp(min=0))
        self.position = position
        self.score, self.importance = means
        missing = score.isneginf()
        return means[0].masked_fill(missing, -torch.inf), means[1].masked_fill(missing, -torch.inf)

    @property
    def nbytes(self) -> int:
        return self.position.nbytes + self.score.nbytes + self.importance.nbytes

    def take_rows(self, rows: list[int]) -> None:
        self.position, self.score, self.importance = (part[rows] for part in (self.position, self.score, self.importance))

    def state(self) -> tuple[Tensors, Numbers]:
        return dict(zip(_NAMES, (self.position, self.score, self.importance))), {}

    @classmethod
    def restore(cls, tensors: Tensors, numbers: Numbers, config: MixKVConfig, dtype: torch.dtype) -> RunningImportance | None:
        return cls(*(tensors[name] for name in _NAMES)) if _NAMES[0] in tensors else None
