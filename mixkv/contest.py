"""Heads of all layers compete for one total: layers are compressed as they come, and trimmed when later ones show more need."""

from __future__ import annotations

import torch

from .budgets import Votes
from .selection import Ranking, Selection


class Contest:
    """The compression of one prompt under ``method="global"``.

    What a layer holds is always enough for its final share, and the result is what choosing over the whole model at once
    would give. Whenever the layers together hold more rows than they finally will, those that can spare most are trimmed: when
    the next layer's keys and values arrive, no more than the final total is held beside them.

    Args:
        num_layers: compressed layers of the model.
        floor: see `mixkv.budgets.Votes`.
    """

    def __init__(self, num_layers: int, floor: float):
        self.num_layers, self.votes = num_layers, Votes(floor)
        # (layer, ranks of its selected rows) in order.
        self.held: list[tuple] = []

    @property
    def over(self) -> bool:
        return len(self.held) == self.num_layers

    def enter(self, ranking: Ranking, scale: torch.Tensor | None = None) -> Selection:
        """The next layer's candidates; returns the rows it may need.

        ``scale`` [B]: what importance is multiplied by to be comparable with other layers'.
        """
        importance = ranking.importance if scale is None else ranking.importance * scale.view(-1, 1, 1)
        self.votes.add(ranking.base, ranking.choosable, importance, num_layers=self.num_layers)
        if self.votes.layers == 1:
            self.total = int(self.votes.total.sum()) + self.num_layers * int((ranking.real - ranking.choosable).sum())
        return ranking.take(self.votes.quota()[:, -1])

    def settle(self, layer, selection: Selection) -> None:
        """``layer`` has stored its ``selection`` (in ``layer.store``); trims what is held.

        With the last layer, every layer is told its ``share``: for every batch row, its rows to those of the average layer.
        """
        self.held.append((layer, selection.flat_ranks))
        rows = sum(layer.store.total for layer, _ in self.held)
        if rows <= self.total and not self.over:
            return
        quota = self.votes.quota()
        needed = quota.sum(dim=(0, 2)).tolist()
        spare = [layer.store.total - count for (layer, _), count in zip(self.held, needed)]
        for index in sorted(range(len(spare)), key=spare.__getitem__, reverse=True):
            if rows <= self.total and not self.over:
                break
            layer, ranks = self.held[index]
            before = layer.store.total
            self.held[index] = (layer, layer.store.trim(ranks, quota[:, index].flatten()))
            rows += layer.store.total - before
        if self.over:
            totals = [sum(layer.store.row_totals[row] for layer, _ in self.held) for row in range(layer.store.batch)]
            for layer, _ in self.held:
                layer.share = [mine * self.num_layers / total for mine, total in zip(layer.store.row_totals, totals)]
