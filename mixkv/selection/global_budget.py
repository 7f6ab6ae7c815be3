"""Heads of all layers share one budget: of rows, evicted when later layers need them more, or of chunks that a step attends to."""

from __future__ import annotations

import numpy as np
import torch

from .. import registry
from ..config import MixKVConfig
from ..ops import dispatch
from .apportion import apportion, to_device, to_host
from .global_topk import GlobalTopK
from .ranking import Ranking, Selection

# Rows that the layers may hold beyond the final total while a prompt is read, as a share of the total and of the candidates of
# one layer, whichever is less. Without them every layer would have rows of several others copied.
_SLACK, _LAYER_SLACK = 1 / 8, 1 / 4


class GlobalBudget:
    """The compression of one prompt under ``method="global"``.

    What a layer holds is always enough for its final share, and the result is what choosing over the whole model at once
    would give. Whenever the layers together hold more rows than the final total and ``slack``, the rows of those that can spare
    most are evicted: when the next layer's keys and values arrive, no more is held beside them.

    Args:
        num_layers: compressed layers of the model.
        floor: see `mixkv.selection.global_topk.GlobalTopK`.
        layer_exponent: a layer's importance is divided by its largest to this power, see `normalized`.
        patient: evicts at the end only, where the prompt's keys and values are held anyway.
        limits: see `mixkv.selection.global_topk.GlobalTopK`.

    Attributes:
        total: rows that all layers hold in the end, the windows' included.
        fixed: for every layer so far, rows that are kept whatever the others need: of its window, and of earlier turns.
        slack: rows that they may hold beyond that until then: an eighth of the total, at most a quarter of one layer's
            candidates.
    """

    def __init__(
        self,
        num_layers: int,
        floor: float,
        layer_exponent: float = MixKVConfig.layer_exponent,
        *,
        patient: bool = False,
        limits: np.ndarray | None = None,
    ):
        self.num_layers, self.counts, self.patient = num_layers, GlobalTopK(floor, limits), patient
        self.layer_exponent = layer_exponent
        self.total = self.slack = 0
        self.fixed: list[int] = []
        # (layer, ranks of its selected rows) in order.
        self.layers: list[tuple] = []
        # The rows that each of them holds.
        self.rows: list[int] = []

    @property
    def complete(self) -> bool:
        return len(self.layers) == self.num_layers

    @property
    def finished(self) -> list:
        """All layers, once no more of their rows is evicted; before that none."""
        return [layer for layer, _ in self.layers] if self.complete else []

    def add_layer(self, ranking: Ranking, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Adds the next layer's candidates, those of all its heads; returns how many [B, Hkv] each may need.

        ``scale`` [B]: what importance is multiplied by to be comparable with other layers'.
        """
        _add(self.counts, ranking, scale, self.num_layers, self.layer_exponent)
        return self.counts.quota()[:, -1].to(ranking.ranks.device)

    def finish_layer(self, layer, selection: Selection) -> None:
        """``layer`` has stored its ``selection``; evicts rows of the layers, by their ``row_totals`` and their ``evict``.

        With the last layer, every layer gets its ``share``: for every batch row, its rows to those of the average layer.
        """
        self.layers.append((layer, selection.flat_ranks))
        self.rows.append(sum(layer.row_totals))
        quota = self.counts.quota()
        self.fixed.append(self.rows[-1] - int(quota[:, -1].sum()))
        to_come = self.num_layers - len(self.layers)
        self.total = sum(self.counts.total) + sum(self.fixed) + to_come * min(self.fixed)
        if len(self.layers) == 1:
            self.slack = int(min(_SLACK * self.total, _LAYER_SLACK * int(self.counts.candidates.sum())))
        rows, most = sum(self.rows), self.total + self.slack
        if not self.complete and (self.patient or rows <= most):
            return
        needed = (quota.sum(dim=(0, 2)) + torch.tensor(self.fixed)).tolist()
        spare = [held - count for held, count in zip(self.rows, needed)]
        for index in sorted(range(len(spare)), key=spare.__getitem__, reverse=True):
            if spare[index] == 0 or (rows <= most and not self.complete):
                break
            layer, ranks = self.layers[index]
            self.layers[index] = (layer, layer.evict(ranks, quota[:, index].to(ranks.device)))
            held = sum(layer.row_totals)
            rows += held - self.rows[index]
            self.rows[index] = held
        if self.complete:
            totals = [sum(row) for row in zip(*(layer.row_totals for layer, _ in self.layers))]
            for layer, _ in self.layers:
                layer.share = [mine * self.num_layers / total for mine, total in zip(layer.row_totals, totals)]


class ChunkBudget:
    """The dynamic heads of ``method="hybridkv"``: they hold every row, and share the chunks that a step attends to.

    Args:
        num_layers, floor, layer_exponent: as of a `GlobalBudget`.
    """

    def __init__(self, num_layers: int, floor: float, layer_exponent: float = MixKVConfig.layer_exponent):
        self.num_layers, self.counts, self.layer_exponent = num_layers, GlobalTopK(floor), layer_exponent
        self.layers: list = []

    @property
    def complete(self) -> bool:
        return len(self.layers) == self.num_layers

    @property
    def finished(self) -> list:
        """As of a `GlobalBudget`."""
        return self.layers if self.complete else []

    def add_layer(self, ranking: Ranking, scale: torch.Tensor | None = None) -> None:
        """Adds the next layer's candidates and scale, as of a `GlobalBudget`."""
        _add(self.counts, ranking, scale, self.num_layers, self.layer_exponent)

    def finish_layer(self, layer, selection: Selection) -> None:
        """``layer`` has stored its ``selection`` and its chunks. With the last layer, each gets the chunks a step attends to."""
        self.layers.append(layer)
        if not self.complete:
            return
        stores = [layer.chunks for layer in self.layers]
        device = selection.lengths.device
        rows = self.counts.quota().to(device)
        none = rows.new_zeros(rows.shape[0], rows.shape[2])
        slots, counts = (
            torch.stack([none if store is None else getattr(store, name).view_as(none).to(none) for store in stores], dim=1)
            for name in ("slots", "counts")
        )
        shared = allocate_chunks(slots.flatten(1), rows.flatten(1), counts.flatten(1)).view_as(slots)
        for index, store in enumerate(stores):
            if store is not None:
                store.set_slots(shared[:, index].flatten())


def layer_exponent(config: MixKVConfig) -> float:
    """The configured layer normalisation exponent; 0 for a score whose numbers can be compared between layers as they are."""
    return 0.0 if registry.score(config.score).comparable else config.layer_exponent


def _add(counts: GlobalTopK, ranking: Ranking, scale: torch.Tensor | None, num_layers: int, exponent: float) -> None:
    importance = ranking.importance if scale is None else ranking.importance * scale.view(-1, 1, 1)
    counts.add(ranking.base, ranking.choosable, normalized(importance, exponent), num_layers=num_layers)


def normalized(importance: torch.Tensor, exponent: float) -> torch.Tensor:
    """A layer's importance [B, Hkv, M] divided by its largest to the power of ``exponent``, the layer normalisation exponent.

    At 0 layers compete with what their rows add to the residual stream, at 1 with the same largest importance each. What a
    prompt's last queries look for does not show how much a later question will need of a layer: at 0 too few rows are left to
    some.
    """
    return dispatch.normalized(importance, exponent)


def allocate_chunks(equal: torch.Tensor, rows: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Chunks that heads attend to in a step: one for each head that has any, the others allocated in proportion to ``rows``.

    Args:
        equal: [B, H] int, chunks a step if all heads get the same, 0 for heads without chunks.
        rows: [B, H] int, KV entries that `GlobalTopK` allocates to them.
        limit: [B, H] int, the chunks there are, no fewer than ``equal``.
    """
    device = limit.device
    equal, rows, limit = to_host(equal, rows, limit)
    certain = (equal > 0).astype(np.int64)
    total = (equal - certain).sum(axis=-1)
    # What is added decides only where nobody has any rows.
    weight = (rows + 1e-6) * certain
    shares = total[:, None] * weight / weight.sum(axis=-1, keepdims=True).clip(min=1e-30)
    return to_device(certain + apportion(shares, total, (limit - certain) * certain), device)
