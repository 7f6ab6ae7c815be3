"""What a score and a method are given: the candidates of one layer.

Shapes: B batch rows, Hq query heads, Hkv KV heads, N tokens of the prompt, W tokens of the observation window (the last ones),
M = N - W candidates (the tokens before it), D and Dv the sizes of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..config import MixKVConfig
from ..ops import dispatch, score_reference
from ..ops.arguments import LogitOptions
from ..tensor_parallel import HeadShard
from .apportion import apportion, to_device, to_host
from .gate import LayerGate


@dataclass(frozen=True, eq=False)
class AllocationContext:
    """What a method allocates a layer's budget by.

    ``budget`` and ``candidates`` are on the CPU, whatever the model's device: allocation is exact in float64, which not every
    device has, and small.

    Attributes:
        budget: int64 [B], candidates that a head keeps on average; the observation window is kept beside them.
        candidates: int64 [B, Hkv], how many candidates each head has to choose from, padding left out.
        importance: float32 [B, Hkv, M], importance of each candidate, comparable between the heads of the layer; -inf for
            padding. On the model's device.
        layer_idx, num_layers: which of the model's compressed layers this is.
        config: the `MixKVConfig`.
    """

    budget: torch.Tensor
    candidates: torch.Tensor
    importance: torch.Tensor
    layer_idx: int
    num_layers: int
    config: MixKVConfig

    @property
    def total(self) -> torch.Tensor:
        """Int64 [B], candidates that all heads of the layer keep together if no layer gets more than another."""
        return (self.budget * self.candidates.shape[-1]).minimum(self.candidates.sum(dim=-1))

    def apportion(self, weights: torch.Tensor) -> torch.Tensor:
        """`total` in proportion to ``weights`` [B, Hkv] >= 0: int64 [B, Hkv], exact, no head above its candidates.

        What a head cannot use goes to the others; without any weight all heads get the same.
        """
        total, candidates = to_host(self.total, self.candidates)
        shares = weights.detach().cpu().numpy().astype(np.float64)
        shares = np.where(shares.sum(axis=-1, keepdims=True) > 0, shares, 1.0)
        shares = shares / shares.sum(axis=-1, keepdims=True) * total[:, None]
        return to_device(apportion(shares, total, candidates), self.candidates.device)


# The prompt's first tokens, on which much attention rests whatever is asked: a replay sees and keeps them, and so does a gate.
FIRST = 4


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured on a prompt beside its queries, keys and values.

    Attributes:
        replay: float32 [B, Hkv, N], the largest attention weight that each token gets while the prompt is repeated; None: it was
            not.
        queries: [B, Hq, n, D], of tokens spread over the replay; None: there was none.
        gate: of the layer, for the heads of this process; None: there is none.
    """

    replay: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    gate: LayerGate | None = None


@dataclass(frozen=True, eq=False)
class ScoreContext:
    """What a score is computed from; properties are computed when they are read.

    Attributes:
        query: [B, Hq, W, D], the queries of the observation window, rotated as the model uses them.
        key, value: [B, Hkv, N, D] and [B, Hkv, N, Dv], of the whole prompt, in the model's dtype.
        config: the `MixKVConfig`.
        mask: bool, [B, 1, N] or [B, Hkv, N], False for padding; None: there is none.
        layer_idx, num_layers: which of the model's compressed layers this is.
        uses_output_importance: whether `importance` is `output_importance`, or `attention`.
        output_factor: see `mixkv.selection.select.rank`.
        given_redundancy: [Hkv] or [B, Hkv], in place of what ``config.redundancy`` says; None: that decides.
        shard: which heads of the layer these are, under tensor parallelism; None: all.
        logits: how the model computes its logits; None: with factor D ** -0.5 and nothing else.
        measured: what else was measured on the prompt.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    config: MixKVConfig
    mask: torch.Tensor | None = None
    layer_idx: int = 0
    num_layers: int = 1
    uses_output_importance: bool = False
    output_factor: torch.Tensor | Callable[[], torch.Tensor | None] | None = None
    given_redundancy: torch.Tensor | None = None
    shard: HeadShard | None = None
    logits: LogitOptions | None = None
    measured: Measured = Measured()

    @cached_property
    def valid(self) -> torch.Tensor:
        """Bool, broadcasts to [B, Hkv, N]: False for padding."""
        return torch.ones(1, 1, self.key.shape[2], dtype=torch.bool, device=self.key.device) if self.mask is None else self.mask

    @cached_property
    def backend(self) -> str:
        """The back end that computes scores, from `mixkv.registry.BACKENDS`."""
        key, value = self.key, self.value
        return dispatch.choose(self.config.backend, key.device, key.dtype, key.shape[-1], value.shape[-1])

    @property
    def num_candidates(self) -> int:
        """M, padding included."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def valid_candidates(self) -> torch.Tensor:
        """Bool, broadcasts to [B, Hkv, M]."""
        return self.valid[..., : self.num_candidates]

    def without_padding(self, numbers: torch.Tensor, filling: float) -> torch.Tensor:
        """``numbers`` [B, Hkv, M], with ``filling`` for padding."""
        return numbers if self.mask is None else numbers.masked_fill(~self.valid_candidates, filling)

    def window_attention(self, statistic: str) -> torch.Tensor:
        """Float32 [B, Hkv, M], ``mean`` or ``rms`` of what the window's queries attend to, not pooled."""
        options = {"statistic": statistic, "group_reduce": self.config.group_reduce}
        return dispatch.window_attention(self.backend, self.query, self.key, self.mask, self._logits, **options)

    @property
    def largest_attention(self) -> torch.Tensor:
        """Float32 [B, Hkv, M], the largest weight that a query of the window gives each candidate, not pooled; 0 for padding."""
        options = {"statistic": "max", "group_reduce": "max"}
        largest = score_reference.window_attention(self.query, self.key, self.mask, self._logits, **options)
        return self.without_padding(largest, 0.0)

    @cached_property
    def attention(self) -> torch.Tensor:
        """Float32 [B, Hkv, M], mean window attention, pooled (SnapKV, arXiv 2404.14469); 0 for padding."""
        return self._importance(kernel_size=self.config.kernel_size, pooling=self.config.pooling)

    @cached_property
    def output_importance(self) -> torch.Tensor:
        """What the window takes out of each entry, in units of the residual stream: comparable across heads and layers.

        The root mean square of its weights favours what *some* window query needs much over what all need a little; pooling
        keeps the neighbours of a peak.

        Returns: float32 [B, Hkv, M], 0 for padding.
        """
        factor = self.output_factor() if callable(self.output_factor) else self.output_factor
        return self._importance(kernel_size=self.config.output_kernel_size, pooling="max", value=self.value, factor=factor)

    @property
    def importance(self) -> torch.Tensor:
        """`output_importance` for a score that declares it, else `attention`."""
        return self.output_importance if self.uses_output_importance else self.attention

    @cached_property
    def diversity(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all valid keys, see `mixkv.ops.score_reference.diversity`."""
        return dispatch.diversity(self.backend, self.key, self.mask)

    @property
    def similarity(self) -> torch.Tensor:
        """Float32 [B, Hkv, M], cosine of each key with the mean direction of the head's keys."""
        return self.diversity[0][..., : self.num_candidates]

    @cached_property
    def redundancy(self) -> torch.Tensor:
        """Float32 [B, Hkv], mean cosine between keys of a head, or what ``config.redundancy`` says it is.

        Raises:
            ValueError: ``config.redundancy`` is a table of another shape.
        """
        found = self._configured_redundancy() if self.given_redundancy is None else self.given_redundancy
        return found.to(self.key.device, torch.float32).expand(self.key.shape[:2])

    @property
    def value_norm(self) -> torch.Tensor:
        """Float32 [B, Hkv, M]."""
        return dispatch.norm(self.backend, self.value[:, :, : self.num_candidates])

    @property
    def key_norm(self) -> torch.Tensor:
        """Float32 [B, Hkv, M]."""
        return dispatch.norm(self.backend, self.key[:, :, : self.num_candidates])

    @property
    def key_float32(self) -> torch.Tensor:
        """[B, Hkv, N, D] float32: a copy of all keys, if they are of another dtype."""
        return self.key.float()

    def match(self, raw: torch.Tensor) -> torch.Tensor:
        """``raw`` [B, Hkv, M], scaled to be comparable with `importance`: see `mixkv.ops.mixing_reference.match`."""
        valid = None if self.mask is None else self.valid_candidates
        return dispatch.match(self.backend, raw, self.importance, valid)

    @property
    def _logits(self) -> LogitOptions:
        return self.logits or LogitOptions.of(self.key.shape[-1])

    def _importance(self, **options: Any) -> torch.Tensor:
        options["group_reduce"] = self.config.group_reduce
        found = dispatch.importance(self.backend, self.query, self.key, self.mask, self._logits, **options)
        return self.without_padding(found, 0.0)

    def _configured_redundancy(self) -> torch.Tensor:
        if self.config.redundancy == "online":
            return self.diversity[1]
        heads = self.key.shape[1]
        shard = self.shard or HeadShard(heads, heads)
        table, layers = self.config.redundancy, self.num_layers
        if len(table) != layers or len(table[0]) != shard.total:
            raise ValueError(
                f"the redundancy table has shape [{len(table)}, {len(table[0])}], but the model has {layers} compressed layers "
                f"of {shard.total} KV heads: give a table [{layers}, {shard.total}] or 'online'"
            )
        return shard.own(torch.tensor(table[self.layer_idx]))
