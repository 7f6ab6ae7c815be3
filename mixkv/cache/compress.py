"""Compression: which entries of a prompt a layer keeps, and which it evicts when generation exceeds the decode budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import registry, tensor_parallel
from ..byte_budget import AUTO
from ..config import MixKVConfig
from ..hf.output_projection import output_factor, output_scale, projected_output
from ..ops.arguments import LogitOptions
from ..selection import scores
from ..selection.context import Measured
from ..selection.gate import LayerGate
from ..selection.global_budget import ChunkBudget, GlobalBudget
from ..selection.ranking import Ranking, Selection
from ..selection.select import allocate, rank
from ..storage import formats  # noqa: F401 (adds the row formats)
from ..storage.chunks import ChunkStore
from ..storage.packed import Store
from ..storage.rows import Rows, with_chunks
from .parts import PromptStatistics, RemoteHeads
from .row_scores import RunningImportance


@dataclass(frozen=True)
class Compressed:
    """What is left of a prompt in one layer.

    Attributes:
        rows: the entries kept.
        selection: of those that are resident.
        statistics: what was measured.
        remote: rows of heads in other processes; None: there are none.
    """

    rows: Rows
    selection: Selection
    statistics: PromptStatistics
    remote: RemoteHeads | None


class Compressor:
    """Chooses what one layer keeps.

    Args:
        config: of the cache.
        layer_idx: which of the ``num_layers`` compressed layers it is.
        module: its attention module; None: not known (a copy, or a pickled cache, before its first forward).
        heads: KV heads of the layer that this process holds.
    """

    # Evicts after the last layer only, where the prompt's keys and values are held anyway: see `GlobalBudget`.
    patient = False
    # Of the layer, where the score needs it.
    gate: LayerGate | None = None

    def __init__(self, config: MixKVConfig, layer_idx: int, num_layers: int, module: nn.Module | None, heads: int):
        self.config, self.module, self.num_layers = config, module, num_layers
        self.layer_position: dict[str, Any] = {"layer_idx": layer_idx, "num_layers": num_layers}
        self.method = registry.method(config.method)
        self.shard = tensor_parallel.shard_of(module, heads)
        self.weighs_output: bool | None = None

    def new_shared_budget(self, limits: np.ndarray | None = None) -> GlobalBudget | ChunkBudget | None:
        """What the layers of a prompt compete for; None: every layer has its own budget.

        ``limits``: int64 [B, layers, all heads], the candidates of every head, where layers differ.

        Raises:
            ValueError: the method does not work with tensor parallelism.
        """
        if not self.method.tensor_parallel and self.shard.sharded:
            others = [name for name, other in registry.METHODS.items() if other.tensor_parallel]
            raise ValueError(
                f"method={self.method.name!r} does not work with tensor parallelism: use another ({', '.join(others)}), or one "
                f"process"
            )
        if not self.method.cross_layer or self.config.budget == AUTO:
            return None
        return self.method.new_budget(self.config, self.num_layers, patient=self.patient, limits=limits)

    def compress(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        logits: LogitOptions,
        *,
        valid: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        shared_budget: GlobalBudget | ChunkBudget | None = None,
        measured: Measured | None = None,
    ) -> Compressed:
        """Keeps the selected entries of a whole prompt.

        Args:
            query: [B, Hq, >= window, D], the last ones.
            key, value: [B, Hkv, N, D].
            output: attention's [B, n, Hq, Dv] for at least the last ``window`` tokens.
            logits: how the model computes its logits.
            valid: bool [B, N], False for padding; None: there is none.
            image: bool [B, N], image tokens; None: none, or not known.
            shared_budget: what the layers of the prompt compete for, if the method is cross-layer.
            measured: what else was measured on the prompt.
        """
        config, key, value = self.config, key.detach(), value.detach()
        image = None if image is None else image.to(key.device)
        ranking = self.rank(query, key, value, logits, valid, measured=measured)
        entries = self.allocate(ranking, output, shared_budget)[0]
        chunks = sparsity = dynamic = remote = None
        if self.method.keeps_chunks:
            plan = self.method.plan(query, key, config, ranking, valid=valid, image=image, logits=logits)
            chunks = ChunkStore.from_plan(key, value, plan, config.backend, offload=config.offload)
            sparsity, dynamic = plan.sparsity, plan.dynamic
            selection = plan.ranking.take(plan.entries)
        else:
            selection = ranking.take(self.shard.own(entries))
            remote = self.remote_heads(entries, key.device)
        rows = registry.row_format(config.rows).rows(key, value, selection, config.backend)
        statistics = PromptStatistics(
            selection.redundancy,
            None if image is None else scores.modal_redundancy(key, image, valid),
            sparsity,
            dynamic,
            weighs_output=self.weighs_output,
            kept_share=(selection.lengths / ranking.real).mean(dim=-1) if config.budget == AUTO else None,
        )
        return Compressed(with_chunks(rows, chunks), selection, statistics, remote)

    def allocate(
        self,
        ranking: Ranking,
        output: torch.Tensor,
        shared_budget: GlobalBudget | ChunkBudget | None,
        remote: RemoteHeads | None = None,
        newest: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How many candidates every head of the layer keeps, those in other processes included.

        Args:
            ranking: of the heads held here.
            output: attention's [B, n, Hq, Dv] for the last tokens.
            shared_budget, remote: as in `compress` and `enforce_decode_budget`.
            newest: as `rank` was given it.

        Returns: int64 [B, all heads], and how many rows, [B, all heads], are kept beside them.
        """
        config, projected = self.config, None
        if shared_budget is None:
            whole, _ = self.gather_heads(ranking, remote=remote, newest=newest)
            entries = allocate(config, whole, **self.layer_position)
        else:
            if self.module is not None and not registry.score(config.score).comparable:
                projected = projected_output(self.module, output[:, -config.window :].detach(), self.shard)
            whole, projected = self.gather_heads(ranking, projected, remote, newest)
            entries = shared_budget.add_layer(whole, None if projected is None else output_scale(projected))
        return entries, whole.real - whole.choosable

    @property
    def decode_config(self) -> MixKVConfig:
        """How rows are chosen while an answer is generated: rows held side by side are not of neighbouring tokens, so nothing is pooled."""
        return self.config.replace(kernel_size=1, output_kernel_size=1, budget=self.config.decode_budget)

    def enforce_decode_budget(
        self,
        query: torch.Tensor,
        store: Store,
        logits: LogitOptions,
        share: list[float] | None,
        remote: RemoteHeads | None,
        running: RunningImportance | None = None,
    ) -> RemoteHeads | None:
        """Evicts from ``store`` what exceeds ``config.decode_budget`` by more than ``config.decode_slack``.

        Args:
            query: [B, Hq, >= window, D], the last ones.
            logits: how the model computes its logits.
            share: for every batch row, this layer's rows to those of the average layer; None: all layers alike.
            remote: rows of heads in other processes.
            running: of earlier evictions, changed by this one; None: the last queries decide alone.

        Returns: ``remote`` afterwards.
        """
        config, shard = self.config, self.shard
        rows = [max(round(config.decode_budget * part), config.window + 1) for part in share or [1.0] * store.batch]
        totals = row_totals(store, remote)
        exceeds = [total > (row + config.decode_slack) * shard.total for total, row in zip(totals, rows)]
        # A copy that has not met its module yet cannot ask other processes: the next forward will.
        if not any(exceeds) or shard.sharded != (remote is not None):
            return remote
        length = longest = None
        if remote is not None:
            longest = remote.lengths(store.lengths.view(store.batch, -1).long()).amax(dim=-1)
            length = int(longest.max())
        key, value, valid = store.padded(length)
        revise = None
        if running is not None:
            count, changed = max(key.shape[2] - config.window, 0), torch.tensor(exceeds, device=key.device)
            position = store.padded_positions(length)[..., :count]
            revise = partial(running.revise, position, changed, config.decode_decay)
        deciding = self.decode_config
        ranking = self.rank(query, key, value, logits, valid, longest, config=deciding, revise=revise)
        # A batch row that does not exceed its budget stays as it is, as it would alone.
        base = [row - config.window if beyond else key.shape[2] for row, beyond in zip(rows, exceeds)]
        ranking = dataclasses.replace(ranking, base=torch.tensor(base, device=key.device))
        kept = allocate(deciding, self.gather_heads(ranking, remote=remote)[0], **self.layer_position)
        store.keep(ranking.take(shard.own(kept)), key.shape[2])
        return self.remote_heads(kept, key.device)

    def rank(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        logits: LogitOptions,
        valid: torch.Tensor | None,
        longest: torch.Tensor | None = None,
        newest: torch.Tensor | None = None,
        measured: Measured | None = None,
        config: MixKVConfig | None = None,
        revise: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> Ranking:
        """The candidates in order; ``longest``, ``newest``, ``revise``: as of `mixkv.selection.select.rank`; ``config``: another one."""
        if self.gate is not None:
            measured = dataclasses.replace(measured or Measured(), gate=self.gate)
        return rank(
            query,
            key,
            value,
            config or self.config,
            attention_mask=valid,
            output_factor=partial(self._output_factor, value),
            shard=self.shard,
            longest=longest,
            newest=newest,
            revise=revise,
            measured=measured,
            logits=logits,
            **self.layer_position,
        )

    def gather_heads(
        self,
        ranking: Ranking,
        projected: torch.Tensor | None = None,
        remote: RemoteHeads | None = None,
        newest: torch.Tensor | None = None,
    ) -> tuple[Ranking, torch.Tensor | None]:
        """``ranking`` of all heads of the layer and the sum of ``projected``, where other processes hold heads of it too."""
        importance = ranking.importance
        if self.method.uses_importance:
            importance, projected = self.shard.gather(importance, projected)
        if not self.shard.sharded:
            return ranking, projected
        alike = ranking.real[:, :1].expand(-1, self.shard.total)
        return ranking.for_heads(importance, alike if remote is None else remote.lengths(ranking.real), newest), projected

    def remote_heads(self, entries: torch.Tensor, device: torch.device, fixed: torch.Tensor | int = 0) -> RemoteHeads | None:
        """Those of a layer whose heads are about to keep ``entries`` [B, all heads] candidates, and ``fixed`` other rows."""
        return RemoteHeads(self.shard, entries.to(device), fixed) if self.shard.sharded else None

    def _output_factor(self, value: torch.Tensor) -> torch.Tensor | None:
        """Of the layer's output projection, for `rank` where it is needed; None: it cannot be read."""
        factor = None
        if self.module is not None:
            factor = output_factor(self.module, value.shape[1], value.shape[3], self.shard)
        self.weighs_output = factor is not None
        return None if factor is None else factor.to(value.device)


def row_totals(store: Store, remote: RemoteHeads | None) -> list[int]:
    """Rows of every batch row of a layer, those of heads in other processes included."""
    return store.row_totals if remote is None else remote.totals(store.row_totals)
