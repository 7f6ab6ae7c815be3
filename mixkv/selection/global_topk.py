"""The most important rows of the whole model, counted head by head while layers come one at a time."""

from __future__ import annotations

import numpy as np
import torch

from ..ops import dispatch
from .apportion import apportion, level, to_host


class GlobalTopK:
    """Rows allocated over the whole model by importance, with a floor; layers come one at a time.

    All candidates of all L x Hkv heads compete: n of the ``L * Hkv * base`` most important belong to a head. So do
    those of each layer by themselves: m of the ``Hkv * base`` most important do. A head gets ``(1 - floor) * v + floor *
    base`` with ``v = (1 - kept) * n + kept * m``, where kept is the share of the candidates that is kept: the fewer rows
    there are, the more go where the model looks most.

    Counts of earlier layers can only fall as later layers arrive, and a head's rows fall with its count: rows beyond the
    `quota` so far are never needed again. Ties go to the earlier layer, head and token.

    Where heads have different numbers of candidates, an equal part is no more than a head, or a layer, has, and what it cannot
    use is added to the parts of the others.

    Args:
        floor: the share of the total that every head gets for certain.
        limits: int64 [B, L, Hkv], the candidates of every head; None: all layers have those of the first.
    """

    def __init__(self, floor: float, limits: np.ndarray | None = None):
        self.floor, self.layers, self.limits = floor, 0, limits
        self.value: torch.Tensor | None = None
        self.owner: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
        self._quota: np.ndarray | None = None
        # How many of each layer's own most important rows belong to each head [B, L * Hkv]: on the host, and not yet there.
        self.within: np.ndarray | None = None
        self._arrived: list[torch.Tensor] = []

    def add(self, base: torch.Tensor, candidates: torch.Tensor, importance: torch.Tensor, *, num_layers: int) -> None:
        """The next layer.

        Args:
            base: [B] int, candidate rows per head on average.
            candidates: [B, Hkv] int, rows to choose from.
            importance: [B, Hkv, M], -inf for padding.
            num_layers: L.

        Raises:
            ValueError: a layer with another number of KV heads than the first.
        """
        batch, heads, _ = importance.shape
        if self.layers == 0:
            self.heads, self.num_layers = heads, num_layers
            means, self.candidates = to_host(base, candidates)
            self._divide(means, np.tile(self.candidates[:, None], (1, num_layers, 1)) if self.limits is None else self.limits)
            self.value = importance.new_empty(batch, 0)
            self.owner = importance.new_empty(batch, 0, dtype=torch.int32)
        elif heads != self.heads:
            raise ValueError(
                f"layer {self.layers} has {heads} KV heads and the first has {self.heads}: sharing out over the whole model "
                f"needs the same number in all layers. Use method='adakv'"
            )
        within = self._parts[self.layers]
        self.layers += 1
        # The layers of a model may lie on several devices.
        so_far = (self.value.to(importance.device), self.owner.to(importance.device))
        merged = dispatch.merge_largest(*so_far, importance, within, self._totals, self.layers * heads)
        self.value, self.owner, self._counts, mine = merged
        self._arrived.append(mine)
        self._quota = None

    def _divide(self, means: np.ndarray, limits: np.ndarray) -> None:
        """Equal parts of the total: of every layer, and of every head."""
        batch, layers, heads = limits.shape
        every, of_layers = limits.sum(axis=(1, 2)), limits.sum(axis=-1)
        total = np.minimum(means * heads * layers, every)
        self.total, self.limit, self.within = (
            total.tolist(),
            limits.reshape(batch, -1),
            np.zeros((batch, layers * heads), np.int64),
        )
        # Of how many of the most important rows each head's are counted: of one layer's, and of the whole model's.
        self._parts = torch.tensor(apportion(level(total, of_layers), total, of_layers)).T.contiguous()
        self._totals = torch.tensor(self.total)
        self.mean_candidates, self.equal = every // (layers * heads), level(total, self.limit)
        self.base = np.minimum(means, self.mean_candidates)
        base, most = self.base[:, None], self.mean_candidates[:, None]
        share = (1 - self.floor) / most.clip(min=1)
        self._weights, self._least = (share * (most - base), share * base), self.floor * self.equal + 2e-6

    def quota(self) -> np.ndarray:
        """[B, layers so far, Hkv] int64: exact when all layers have come, until then no less than what they will get."""
        if self._quota is None:
            self._quota = self._allocate()
        return self._quota

    def _allocate(self) -> np.ndarray:
        batch, device = self.value.shape[0], self.value.device
        counts, *arrived = to_host(self._counts, *(layer.to(device) for layer in self._arrived))
        heads = self.layers * self.heads
        if arrived:
            first = heads - len(arrived) * self.heads
            self.within[:, first:heads] = np.concatenate(arrived, axis=1)
            self._arrived = []
        within, limit, equal = self.within[:, :heads], self.limit[:, :heads], self.equal[:, :heads]
        base, most = self.base[:, None], self.mean_candidates[:, None]
        if self.layers == self.num_layers:
            # In whole numbers up to the division: heads with equal counts get equal shares, whichever way they came by them.
            counts = ((most - base) * counts + base * within) / most.clip(min=1)
            rows = apportion((1 - self.floor) * counts + self.floor * equal, np.array(self.total), limit)
        else:
            # The same but for rounding, for which there is room: `apportion` rounds up by at most one.
            of_model, of_layer = self._weights
            rows = np.minimum((of_model * counts + of_layer * within + self._least[:, :heads]).astype(np.int64) + 1, limit)
        return rows.reshape(batch, self.layers, self.heads)
