"""Heads of all layers compete for one total: of rows, trimmed when later layers show more need, or of chunks a step."""

from __future__ import annotations

import torch

from ..config import MixKVConfig
from .apportion import apportion
from .global_topk import Votes
from .ranking import Ranking, Selection


class Contest:
    """The compression of one prompt under ``method="global"``.

    What a layer holds is always enough for its final share, and the result is what choosing over the whole model at once
    would give. Whenever the layers together hold more rows than they finally will, those that can spare most are trimmed: when
    the next layer's keys and values arrive, no more than the final total is held beside them.

    Args:
        num_layers: compressed layers of the model.
        floor: see `mixkv.selection.global_topk.Votes`.
        layer_exponent: a layer's importance is divided by its largest to this power.
        patient: trims at the end only, where the prompt's keys and values are held anyway.
    """

    def __init__(
        self, num_layers: int, floor: float, layer_exponent: float = MixKVConfig.layer_exponent, *, patient: bool = False
    ):
        self.num_layers, self.votes, self.patient = num_layers, Votes(floor), patient
        self.layer_exponent = layer_exponent
        # (layer, ranks of its selected rows) in order.
        self.held: list[tuple] = []

    @property
    def over(self) -> bool:
        return len(self.held) == self.num_layers

    def enter(self, ranking: Ranking, scale: torch.Tensor | None = None) -> torch.Tensor:
        """The next layer's candidates, those of all its heads; returns how many [B, Hkv] each may need.

        ``scale`` [B]: what importance is multiplied by to be comparable with other layers'.
        """
        _vote(self.votes, ranking, scale, self.num_layers, self.layer_exponent)
        if self.votes.layers == 1:
            self.total = sum(self.votes.total) + self.num_layers * int((ranking.real - ranking.choosable).sum())
        return self.votes.quota()[:, -1]

    def settle(self, layer, selection: Selection) -> None:
        """``layer`` has stored its ``selection``; trims what is held, by its ``row_totals`` and its ``trim``.

        With the last layer, every layer is told its ``share``: for every batch row, its rows to those of the average layer.
        """
        self.held.append((layer, selection.flat_ranks))
        rows = sum(sum(layer.row_totals) for layer, _ in self.held)
        if not self.over and (self.patient or rows <= self.total):
            return
        quota = self.votes.quota()
        needed = quota.sum(dim=(0, 2)).tolist()
        spare = [sum(layer.row_totals) - count for (layer, _), count in zip(self.held, needed)]
        for index in sorted(range(len(spare)), key=spare.__getitem__, reverse=True):
            if rows <= self.total and not self.over:
                break
            layer, ranks = self.held[index]
            before = sum(layer.row_totals)
            self.held[index] = (layer, layer.trim(ranks, quota[:, index]))
            rows += sum(layer.row_totals) - before
        if self.over:
            totals = [sum(row) for row in zip(*(layer.row_totals for layer, _ in self.held))]
            for layer, _ in self.held:
                layer.share = [mine * self.num_layers / total for mine, total in zip(layer.row_totals, totals)]


class SlotContest:
    """The dynamic heads of ``method="hybridkv"``: they hold every row, and compete for how many chunks a step attends to.

    Args:
        num_layers, floor, layer_exponent: as of a `Contest`.
    """

    def __init__(self, num_layers: int, floor: float, layer_exponent: float = MixKVConfig.layer_exponent):
        self.num_layers, self.votes, self.layer_exponent = num_layers, Votes(floor), layer_exponent
        self.layers: list = []

    @property
    def over(self) -> bool:
        return len(self.layers) == self.num_layers

    def enter(self, ranking: Ranking, scale: torch.Tensor | None = None) -> None:
        """The next layer's candidates and scale, as of a `Contest`."""
        _vote(self.votes, ranking, scale, self.num_layers, self.layer_exponent)

    def settle(self, layer, selection: Selection) -> None:
        """``layer`` has stored its ``selection`` and its chunks. With the last one, all are told how many a step attends to."""
        self.layers.append(layer)
        if not self.over:
            return
        rows = self.votes.quota()
        stores = [layer.chunks for layer in self.layers]
        none = rows.new_zeros(rows.shape[0], rows.shape[2])
        slots, counts = (
            torch.stack([none if store is None else getattr(store, name).view_as(none).to(none) for store in stores], dim=1)
            for name in ("slots", "counts")
        )
        shared = allocate_chunks(slots.flatten(1), rows.flatten(1), counts.flatten(1)).view_as(slots)
        for index, store in enumerate(stores):
            if store is not None:
                store.set_slots(shared[:, index].flatten())


def _vote(votes: Votes, ranking: Ranking, scale: torch.Tensor | None, num_layers: int, layer_exponent: float) -> None:
    importance = ranking.importance if scale is None else ranking.importance * scale.view(-1, 1, 1)
    votes.add(ranking.base, ranking.choosable, _evened(importance, layer_exponent), num_layers=num_layers)


def _evened(importance: torch.Tensor, exponent: float) -> torch.Tensor:
    """A layer's importance [B, Hkv, M] divided by a power of its largest.

    With an exponent of 2/3, two thirds of the way, geometrically, from what rows add to as many votes for every layer. What a prompt's last queries
    look for does not tell how much a later question will need of a layer: taken as it is, too few rows are left to some.
    """
    if importance.shape[-1] == 0:
        return importance
    largest = importance.amax(dim=(-2, -1), keepdim=True)
    return torch.where(largest > 0, importance / largest**exponent, importance)


def allocate_chunks(equal: torch.Tensor, rows: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Chunks that heads attend to in a step: one for each head that has any, the others allocated in proportion to ``rows``.

    Args:
        equal: [B, H] int, chunks a step if all heads get the same, 0 for heads without chunks.
        rows: [B, H] int, KV entries that `Votes` allocates to them.
        limit: [B, H] int, the chunks there are, no fewer than ``equal``.
    """
    device = equal.device
    # Not every device has float64.
    equal, rows, limit = equal.cpu(), rows.cpu(), limit.cpu()
    certain = (equal > 0).long()
    total = (equal - certain).sum(dim=-1)
    # What is added decides only where no head has any rows.
    weight = (rows.double() + 1e-6) * certain
    shares = total.unsqueeze(-1) * weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return (certain + apportion(shares, total, (limit - certain) * certain)).to(device)
