"""The most important rows of the whole model, counted head by head while layers come one at a time."""

from __future__ import annotations

import numpy as np
import torch

from ..ops import dispatch
from ..ops.selection_reference import Largest
from .apportion import apportion, to_host


class GlobalTopK:
    """Rows allocated over the whole model by importance, with a floor; layers come one at a time.

    All candidates of all L x Hkv heads compete: n of the ``L * Hkv * base`` most important belong to a head. So do
    those of each layer by themselves: m of the ``Hkv * base`` most important do. A head gets ``(1 - floor) * v + floor *
    base`` with ``v = (1 - kept) * n + kept * m``, where kept is the share of the candidates that is kept: the fewer rows
    there are, the more go where the model looks most.

    Counts of earlier layers can only fall as later layers arrive, and a head's rows fall with its count: rows beyond the
    `quota` so far are never needed again. Ties go to the earlier layer, head and token.

    Args:
        floor: the share of the total that every head gets for certain.
    """

    def __init__(self, floor: float):
        self.floor, self.layers = floor, 0
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
            self.base = np.minimum(means, self.candidates.max(axis=-1))
            self.total = (self.base * heads * num_layers).tolist()
            self.largest, self._limits = self._start(importance)
        elif heads != self.heads:
            raise ValueError(
                f"layer {self.layers} has {heads} KV heads and the first has {self.heads}: sharing out over the whole model "
                f"needs the same number in all layers. Use method='adakv'"
            )
        self.layers += 1
        # The layers of a model may lie on several devices.
        so_far = Largest._make(part.to(importance.device) for part in self.largest)
        self.largest = dispatch.merge_largest(so_far, importance, *self._limits, floor=self.floor)
        self._quota = None

    def quota(self) -> torch.Tensor:
        """Int64 [B, layers so far, Hkv] on the CPU: exact when all layers have come, until then no less than what they will get."""
        if self._quota is None:
            rows = self._allocate() if self.layers == self.num_layers else self.largest.bound
            self._quota = rows.view(rows.shape[0], self.layers, self.heads)
        return self._quota

    def _start(self, importance: torch.Tensor) -> tuple[Largest, tuple[torch.Tensor, ...]]:
        """Before the first layer: nothing, and what `merge_largest` is given of every layer."""
        own = [total // self.num_layers for total in self.total]
        limits = tuple(torch.tensor(part) for part in (own, self.total, self.base, self.candidates))
        batch, kinds = importance.shape[0], (torch.float32, torch.int32, torch.int64, torch.int64, torch.int64)
        return Largest(*(torch.empty(batch, 0, dtype=kind, device=importance.device) for kind in kinds)), limits

    def _allocate(self) -> torch.Tensor:
        """Int64 [B, L * Hkv], of all layers: `Largest.bound` in exact numbers; what `apportion` adds is no more than one."""
        counts, within = to_host(self.largest.counts, self.largest.within)
        base, most = self.base[:, None], self.candidates.max(axis=-1, keepdims=True)
        # In whole numbers up to the division: heads with equal counts get equal shares, whichever way they came by them.
        counts = ((most - base) * counts + base * within) / most.clip(min=1)
        shares = (1 - self.floor) * counts + self.floor * base
        return torch.from_numpy(apportion(shares, np.array(self.total), np.tile(self.candidates, (1, self.num_layers))))
