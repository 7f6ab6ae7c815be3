"""One reading of a prompt, many caches: what attention saw is recorded once and compressed again by any configuration."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from ..cache import MixKVCache
from ..cache.layer import MixKVLayer
from ..config import MixKVConfig
from ..registry import CONTESTS
from ..selection.ranking import Ranking
from ..selection.select import base_rows
from ..storage.chunks import ChunkStore
from ..storage.ragged import RaggedStore
from .measure import bind, end_tokens, last_logits_only

# Options by which heads get more or fewer rows, but no other ones.
_SHARING = (
    "budget",
    "profile",
    "pyramid_beta",
    "ada_floor",
    "global_floor",
    "hybrid_threshold",
    "hybrid_floor",
    "hybrid_chunk",
)


class Recording:
    """A prompt [B, N] read once by ``model``.

    Attributes:
        cache: an uncompressed `MixKVCache` that holds the prompt.
        logits: [B, V], of the token after the prompt.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        *,
        window: int = 128,
        inputs: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ):
        """``inputs``: what the model reads with the prompt: pixel_values and the like."""
        self.model = model
        self.cache = _RecordingCache(model, budget=input_ids.shape[1] + window, window=window)
        options = {**inputs, **last_logits_only(model)}
        self.logits = model(input_ids=input_ids, past_key_values=self.cache, use_cache=True, **options).logits[:, -1]
        self._inputs = [
            layer.recorded if isinstance(layer, MixKVLayer) else copy.deepcopy(layer) for layer in self.cache.layers
        ]
        self._rankings: list[dict[str, Ranking]] = [{} for _ in self.cache.layers]

    def compressed(self, config: MixKVConfig | None) -> MixKVCache:
        """The cache that reading the prompt under ``config`` leaves; None: the full cache.

        Raises:
            ValueError: ``config.window`` exceeds the recorded window.
        """
        cache = _ReplayCache(self.model, config or self.cache.config)
        name = _name(cache.config)
        for index, (layer, recorded) in enumerate(zip(cache.layers, self._inputs)):
            if isinstance(layer, MixKVLayer):
                layer.known, layer.name = self._rankings[index], name
                layer.adopt(*recorded)
                layer.known = None
            else:
                cache.layers[index] = copy.deepcopy(recorded)
        return cache

    @torch.no_grad()
    def follow(self, cache: MixKVCache, input_ids: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """Feeds tokens [B, n] after the prompt at once, each seeing those before it: logits [B, n, V], or of the ``last`` ones."""
        bind(self.model, cache)
        last = last or input_ids.shape[1]
        options = last_logits_only(self.model, last)
        return self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **options).logits[:, -last:]

    @torch.no_grad()
    def answer(self, first: torch.Tensor, count: int) -> torch.Tensor:
        """Greedy tokens [1, n <= count] of the full cache after tokens ``first`` [1, f], end-of-text token included."""
        ends = end_tokens(self.model)
        cache, fed, tokens = self.compressed(None), first, []
        while len(tokens) < count and (not tokens or tokens[-1] not in ends):
            fed = self.follow(cache, fed, last=1).argmax(-1)
            tokens.append(int(fed))
        return torch.tensor([tokens], device=first.device)


def joined(caches: Sequence[MixKVCache]) -> MixKVCache:
    """Caches of one prompt of batch size 1, under whatever budgets, as the rows of one batch, for forwards at a common cost.

    Raises:
        ValueError: they keep chunks of different numbers of rows.
    """
    together = copy.deepcopy(caches[0])
    for index, layer in enumerate(together.layers):
        if not isinstance(layer, MixKVLayer):
            layer.batch_repeat_interleave(len(caches))
            continue
        parts = [cache.layers[index] for cache in caches]
        rows = tuple(torch.cat(part) for part in zip(*(part.store.held() for part in parts)))
        lengths = torch.cat([part.store.lengths.view(1, -1) for part in parts])
        layer.store = RaggedStore.from_rows(rows, lengths, layer.store.backend)
        layer.chunks = ChunkStore.joined([part.chunks for part in parts], [part.store.batch for part in parts])
        layer.sparsity = layer.dynamic = None
        layer.redundancy = torch.cat([part.redundancy for part in parts])
        layer.share = layer.query_tail = layer.modal_redundancy = None
    together._batch = len(caches)
    return together


def _name(config: MixKVConfig) -> str:
    """The same for configurations that differ only in who gets how many rows."""
    judged = config.to_dict() | dict.fromkeys(_SHARING) | {"method": config.method in CONTESTS}
    return json.dumps(judged, sort_keys=True)


class _ReplayLayer(MixKVLayer):
    """Ranks candidates once for all configurations of one name."""

    known: dict[str, Ranking] | None = None
    name: str

    def _global_budget(self, patient: bool = True):
        # The recording holds the whole prompt: trimming on the way would save nothing.
        return super()._global_budget(patient)

    def _rank(self, key, value, valid, options):
        if self.name not in self.known:
            self.known[self.name] = super()._rank(key, value, valid, options)
        found = self.known[self.name]
        return replace(found, base=base_rows(self.shared.config, found.real.amax(dim=-1)))


class _ReplayCache(MixKVCache):
    layer_class = _ReplayLayer


class _RecordingLayer(MixKVLayer):
    """Keeps what `compress` is given."""

    def compress(self, query, key, value, output, valid, options):
        last = slice(-self.shared.config.window, None)
        self.recorded = (self.module(), query[:, :, last].clone(), key, value, output[:, last].clone(), valid, options)
        super().compress(query, key, value, output, valid, options)


class _RecordingCache(MixKVCache):
    layer_class = _RecordingLayer
