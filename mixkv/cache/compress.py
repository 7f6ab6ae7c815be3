"""Which rows of a prompt a layer keeps, and which it drops again when generation outgrows its bound."""

from __future__ import annotations

import dataclasses
import weakref

import torch

from .. import tensor_parallel
from ..hf.output_projection import output_factor, output_scale, projected_output
from ..registry import CONTESTS, OUTPUT_SCORES
from ..selection import hybrid, scores
from ..selection.ranking import Ranking, Selection
from ..selection.select import quota, rank
from ..storage.chunks import ChunkStore
from ..storage.ragged import RaggedStore
from .global_budget import ChunkBudget, GlobalBudget
from .state import Shared


class Compression:
    """The part of a layer that chooses: from a prompt's queries, keys and values to a `RaggedStore`.

    Attributes:
        shared: what the layers of a cache know together.
        ordinal: which of the compressed layers this is.
        module: the attention module it belongs to, once known.
        shape: KV heads, key size, value size.
        arrived: columns that came with the last forward.
        store: the rows held; None until the prompt has been read.
        chunks: rows of ``hybridkv``'s dynamic heads; sparsity, dynamic: [B, Hkv], how its heads were told apart.
        dense: the prompt so far, while it comes in chunks.
        query_tail: the last queries, [B, Hq, >= window, D].
        redundancy: [B, Hkv]; modal_redundancy: [B, Hkv, 2], of image keys and of text keys.
        share: for every batch row, this layer's rows to those of the average layer; None: all layers alike.
        spread: how rows differ among heads held in other processes; None: there are none.
        weighs_output: whether rows were weighed by what they add to the layer's output; None: they were not to be.
        options: what the model does to its logits.
    """

    shared: Shared
    ordinal: int
    module: weakref.ref | None
    shape: tuple[int, ...] | None
    arrived: int
    store: RaggedStore | None
    chunks: ChunkStore | None
    sparsity: torch.Tensor | None
    dynamic: torch.Tensor | None
    dense: tuple[torch.Tensor, torch.Tensor] | None
    query_tail: torch.Tensor | None
    redundancy: torch.Tensor | None
    modal_redundancy: torch.Tensor | None
    share: list[float] | None
    spread: tensor_parallel.Spread | None
    weighs_output: bool | None
    options: dict

    def compress(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        valid: torch.Tensor | None,
        options: dict,
    ) -> None:
        """Keeps the selected rows of a whole prompt.

        key, value [B, Hkv, N, D]; query [B, Hq, n, D] and attention's output [B, n, Hq, Dv] hold at least the last columns.
        """
        self._remember(query)
        key, value = key.detach(), value.detach()
        config, budget, part = self.shared.config, self._global_budget(), self._part
        ranking = self._rank(key, value, valid, options)
        if budget is None:
            rows = quota(config, self._of_all(ranking)[0], **self._place)
        else:
            module, last = self.module and self.module(), output[:, -config.window :].detach()
            projected = None if module is None else projected_output(module, last, part)
            whole, projected = self._of_all(ranking, projected)
            rows = budget.add_layer(whole, None if projected is None else output_scale(projected))
        if config.method == "hybridkv":
            selection = self._split_heads(key, value, ranking, valid, options)
        else:
            selection = ranking.take(part.own(rows))
            self._count(rows)
        self.store = RaggedStore.from_selection(key, value, selection, config.backend)
        if budget is not None:
            budget.finish_layer(self, selection)
            if budget.complete:
                self.shared.global_budget = None
        self.redundancy = selection.redundancy
        image = self.shared.images.of_prompt
        if image is not None:
            self.modal_redundancy = scores.modal_redundancy(key, image.to(key.device), valid)
        self.dense = None
        self.options = options
        if self.shared.config.decode_budget is None:
            self.query_tail = None

    def _split_heads(
        self, key: torch.Tensor, value: torch.Tensor, ranking: Ranking, valid: torch.Tensor | None, options: dict
    ) -> Selection:
        """Puts dynamic heads' rows in chunks; returns what is always resident."""
        config, image = self.shared.config, self.shared.images.of_prompt
        image = None if image is None else image.to(key.device)
        plan = hybrid.plan(self.query_tail, key, config, ranking, valid=valid, image=image, **options)
        self.chunks = ChunkStore.from_plan(key, value, plan, config.backend, offload=config.offload)
        self.sparsity, self.dynamic = plan.sparsity, plan.dynamic
        return plan.ranking.take(plan.rows)

    def trim(self, ranks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`RaggedStore.trim` to ``rows`` [B, all heads of the layer]."""
        self._count(rows)
        return self.store.trim(ranks, self._part.own(rows).flatten())

    @property
    def row_totals(self) -> list[int]:
        """Rows of every batch row, those of heads in other processes included."""
        totals = self.store.row_totals
        return totals if self.spread is None else self.spread.totals(totals)

    @property
    def _part(self) -> tensor_parallel.Slice:
        """Which of the layer's heads are held here."""
        return tensor_parallel.slice_of(self.module and self.module(), self.shape[0])

    def _count(self, rows: torch.Tensor) -> None:
        """All heads of the layer are about to keep ``rows`` [B, all heads] candidates."""
        if self._part.sliced:
            self.spread = tensor_parallel.Spread(self._part, rows.to(self.device))

    def _of_all(self, ranking: Ranking, projected: torch.Tensor | None = None) -> tuple[Ranking, torch.Tensor | None]:
        """``ranking`` of all heads of the layer and the sum of ``projected``, where other processes hold heads of it too."""
        part = self._part
        importance = ranking.importance
        if self.shared.config.method in ("adakv", "global"):
            importance, projected = part.gather(importance, projected)
        if not part.sliced:
            return ranking, projected
        alike = ranking.real[:, :1].expand(-1, part.total)
        return ranking.over(importance, alike if self.spread is None else self.spread.lengths(ranking.real)), projected

    def _global_budget(self, patient: bool = False) -> GlobalBudget | ChunkBudget | None:
        """What this layer competes in for its rows, or its chunks."""
        config, layers = self.shared.config, self.shared.num_layers
        if config.method not in CONTESTS:
            return None
        if config.method == "hybridkv" and self._part.sliced:
            raise ValueError(
                "method='hybridkv' does not work with tensor parallelism: take 'global' or 'adakv', or one process"
            )
        if self.ordinal == 0:
            if config.method == "hybridkv":
                self.shared.global_budget = ChunkBudget(layers, config.hybrid_floor)
            else:
                self.shared.global_budget = GlobalBudget(layers, config.global_floor, patient=patient)
        return self.shared.global_budget

    def _output_factor(self, value: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """The option of `rank` by that name, where it is used."""
        config = self.shared.config
        if config.score not in OUTPUT_SCORES and config.method not in CONTESTS:
            return {}
        module = self.module and self.module()
        factor = None if module is None else output_factor(module, value.shape[1], value.shape[3], self._part)
        self.weighs_output = factor is not None
        return {"output_factor": None if factor is None else factor.to(value.device)}

    def _rank(self, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor | None, options: dict) -> Ranking:
        """The candidates of a whole prompt in order."""
        rest = {"attention_mask": valid, **self._place, **options, **self._output_factor(value), "part": self._part}
        return rank(self.query_tail, key, value, self.shared.config, **rest)

    def _remember(self, query: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Keeps the last window of queries, those of padding left out; while recording as many more as may be taken back."""
        query, new = query.detach(), query.shape[2]
        if self.query_tail is not None:
            query = torch.cat([self.query_tail, query], dim=2)
        if valid is not None:
            real = torch.nn.functional.pad(valid, (query.shape[2] - new, 0), value=True)
            order = real.long().argsort(dim=-1, stable=True)
            query = query.gather(2, order[:, None, :, None].expand_as(query))
        wanted = self.shared.config.window + (self.arrived if self.shared.recording else 0)
        self.query_tail = query[:, :, -wanted:].clone()

    def _bound(self) -> None:
        config = self.shared.config
        if config.decode_budget is None or self.store is None:
            return
        shares, part = self.share or [1.0] * self.store.batch, self._part
        rows = [max(round(config.decode_budget * share), config.window + 1) for share in shares]
        over = [total > (row + config.decode_slack) * part.total for total, row in zip(self.row_totals, rows)]
        # A copy that has not met its module yet cannot ask other processes: the next forward will.
        if not any(over) or part.sliced != (self.spread is not None):
            return
        length = longest = None
        if self.spread is not None:
            longest = self.spread.lengths(self.store.lengths.view(self.store.batch, -1).long()).amax(dim=-1)
            length = int(longest.max())
        key, value, valid = self.store.padded(length)
        options = {**self.options, **self._output_factor(value), "part": part, "longest": longest}
        ranking = rank(self.query_tail, key, value, config, attention_mask=valid, **self._place, **options)
        # A batch row that is within its bound stays as it is, as it would alone.
        base = [row - config.window if beyond else key.shape[2] for row, beyond in zip(rows, over)]
        ranking = dataclasses.replace(ranking, base=torch.tensor(base, device=key.device))
        kept = quota(config, self._of_all(ranking)[0], **self._place)
        self._count(kept)
        self.store.keep(ranking.take(part.own(kept)), key.shape[2])

    @property
    def _place(self) -> dict[str, int]:
        return {"layer_idx": self.ordinal, "num_layers": self.shared.num_layers}
