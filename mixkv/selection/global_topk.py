"""The most important rows of the whole model, counted head by head while layers come one at a time."""

from __future__ import annotations

import numpy as np
import torch

from ..ops import dispatch
from ..ops.selection_reference import LEAST_UNIT, Largest
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
        self.largest: Largest | None = None
        self._quota: torch.Tensor | None = None

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
            kinds = (torch.float32, torch.int32, torch.int64, torch.int64, torch.int64)
            self.largest = Largest(*(torch.empty(batch, 0, dtype=kind, device=importance.device) for kind in kinds))
        elif heads != self.heads:
            raise ValueError(
                f"layer {self.layers} has {heads} KV heads and the first has {self.heads}: sharing out over the whole model "
                f"needs the same number in all layers. Use method='adakv'"
            )
        part = self._parts[self.layers]
        self.layers += 1
        # The layers of a model may lie on several devices.
        device, so_far = importance.device, self.largest
        so_far = so_far._replace(value=so_far.value.to(device), owner=so_far.owner.to(device), within=so_far.within.to(device))
        self.largest = dispatch.merge_largest(so_far, importance, part, *self._shares, floor=self.floor)
        self._quota = None

    def _divide(self, means: np.ndarray, limits: np.ndarray) -> None:
        """Equal parts of the total: of every layer, and of every head."""
        batch, layers, heads = limits.shape
        every, of_layers = limits.sum(axis=(1, 2)), limits.sum(axis=-1)
        total = np.minimum(means * heads * layers, every)
        self.total, self.limit = total.tolist(), limits.reshape(batch, -1)
        # Of how many of the most important rows each head's are counted: of one layer's, and of the whole model's.
        self._parts = torch.tensor(apportion(level(total, of_layers), total, of_layers)).T.contiguous()
        self.mean_candidates, self.equal = every // (layers * heads), level(total, self.limit)
        self.base = np.minimum(means, self.mean_candidates)
        least = np.ceil(self.floor * self.equal * LEAST_UNIT).astype(np.int64)
        self._shares = [torch.tensor(part) for part in (self.total, self.base, self.mean_candidates, least, self.limit)]

    def quota(self) -> torch.Tensor:
        """Int64 [B, layers so far, Hkv] on the CPU: exact when all layers have come, until then no less than what they will get."""
        if self._quota is None:
            rows = self._allocate() if self.layers == self.num_layers else self.largest.bound
            self._quota = rows.view(rows.shape[0], self.layers, self.heads)
        return self._quota

    def _allocate(self) -> torch.Tensor:
        """Int64 [B, L * Hkv], of all layers: `Largest.bound` in exact numbers; what `apportion` adds is no more than one."""
        counts, within = to_host(self.largest.counts, self.largest.within)
        base, most = self.base[:, None], self.mean_candidates[:, None]
        # In whole numbers up to the division: heads with equal counts get equal shares, whichever way they came by them.
        counts = ((most - base) * counts + base * within) / most.clip(min=1)
        shares = (1 - self.floor) * counts + self.floor * self.equal
        return torch.from_numpy(apportion(shares, np.array(self.total), self.limit))
