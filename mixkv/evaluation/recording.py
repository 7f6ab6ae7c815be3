"""Many caches from one prefill: the inputs of compression are recorded once and compressed again by any config."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import cast

import torch
from transformers import PreTrainedModel

from .. import registry
from ..cache import MixKVCache
from ..cache.compress import Compressor
from ..cache.layer import MixKVLayer
from ..cache.parts import PromptStatistics
from ..config import MixKVConfig
from ..hf.versions import cache_argument, last_logits_only
from ..selection.budget import base_entries
from ..selection.context import Measured
from ..selection.ranking import Ranking
from ..storage.chunks import ChunkStore
from ..storage.packed import joined as joined_stores
from ..storage.rows import RaggedRows, with_chunks
from .measure import bind, end_tokens


class Recording:
    """The prefill of a prompt [B, N].

    Attributes:
        cache: an uncompressed `MixKVCache` of the prompt.
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
        replay_chunk: int | None = None,
    ):
        """Runs the prefill.

        Args:
            window: the largest observation window of the configs to be compressed by.
            inputs: further inputs of the model, such as pixel_values.
            replay_chunk: as in `MixKVConfig`, to replay the prompt for the configs whose score needs that; None: it is not
                replayed.
        """
        self.model = model
        config = MixKVConfig(budget=input_ids.shape[1] + window, window=window)
        if replay_chunk is not None:
            config = config.replace(score="replay", replay_chunk=replay_chunk)
        self.cache = _RecordingCache(model, config)
        options = {**inputs, **last_logits_only(model)}
        self.logits = model(input_ids=input_ids, **cache_argument(self.cache), use_cache=True, **options).logits[:, -1]
        self._inputs = [
            layer.recorded if isinstance(layer, MixKVLayer) else copy.deepcopy(layer) for layer in self.cache.layers
        ]
        self._rankings: list[dict[str, Ranking]] = [{} for _ in self.cache.layers]

    def compressed(self, config: MixKVConfig | None) -> MixKVCache:
        """The cache that a prefill under ``config`` gives; None: the full cache.

        Raises:
            ValueError: ``config.window`` exceeds the recorded window.
        """
        cache = _RecordedCache(self.model, config or self.cache.config)
        name = _name(cache.config)
        for index, (layer, recorded) in enumerate(zip(cache.layers, self._inputs)):
            if isinstance(layer, MixKVLayer):
                layer.known, layer.name = self._rankings[index], name
                layer.fill(*recorded)
                layer.known = None
            else:
                cache.layers[index] = copy.deepcopy(recorded)
        return cache

    @torch.no_grad()
    def follow(self, cache: MixKVCache, input_ids: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """Feeds tokens [B, n] after the prompt in one forward: logits [B, n, V], or those of the ``last`` tokens."""
        bind(self.model, cache)
        last = last or input_ids.shape[1]
        options = last_logits_only(self.model, last)
        return self.model(input_ids=input_ids, **cache_argument(cache), use_cache=True, **options).logits[:, -last:]

    @torch.no_grad()
    def answer(self, first: torch.Tensor, count: int) -> torch.Tensor:
        """The full cache's greedy answer [1, n <= count] after tokens ``first`` [1, f], including the end-of-text token."""
        ends = end_tokens(self.model)
        cache, fed = self.compressed(None), first
        tokens: list[int] = []
        while len(tokens) < count and (not tokens or tokens[-1] not in ends):
            fed = self.follow(cache, fed, last=1).argmax(-1)
            tokens.append(int(fed))
        return torch.tensor([tokens], device=first.device)


def joined(caches: Sequence[MixKVCache]) -> MixKVCache:
    """Caches of one prompt of batch size 1, with any budgets, as the batch rows of one cache, so that they share forwards.

    Raises:
        ValueError: their chunks differ in size.
    """
    together = copy.deepcopy(caches[0])
    for index, layer in enumerate(together.layers):
        if not isinstance(layer, MixKVLayer):
            layer.batch_repeat_interleave(len(caches))
            continue
        parts = [cache.layers[index] for cache in caches]
        store = joined_stores([part.store for part in parts])
        chunks = ChunkStore.joined([part.chunks for part in parts], [part.store.batch for part in parts])
        layer.rows = with_chunks(RaggedRows(store), chunks)
        layer.statistics = PromptStatistics(torch.cat([part.statistics.redundancy for part in parts]))
        layer.window = None
    together._batch = len(caches)
    return together


def _name(config: MixKVConfig) -> str:
    """A key that is equal for configs that differ only in the allocation of the budget."""
    allocation = {"budget", "refit", "rows"}.union(*(method.options for method in registry.METHODS.values()))
    importance = {"method": registry.method(config.method).uses_output_importance}
    return json.dumps(config.to_dict() | dict.fromkeys(allocation) | importance, sort_keys=True)


class _RecordedCompressor(Compressor):
    """Ranks candidates once for all configurations of one ``name``; ``known``: rankings by name, None: ranks as ever."""

    # The recording has the whole prompt in memory: early eviction would save nothing.
    patient = True
    known: dict[str, Ranking] | None = None
    name: str

    def rank(self, *args, **options):
        if self.known is None:
            return super().rank(*args, **options)
        if self.name not in self.known:
            self.known[self.name] = super().rank(*args, **options)
        found = self.known[self.name]
        key, value, place = args[1], args[2], {"heads": self.shard.total, "num_layers": self.num_layers}
        return replace(found, base=base_entries(self.config, found.real.amax(dim=-1), key, value, **place))


class _RecordedLayer(MixKVLayer):
    compressor_class = _RecordedCompressor
    known: dict[str, Ranking] | None = None
    name: str

    def compressor(self) -> Compressor:
        compressor = cast(_RecordedCompressor, super().compressor())
        if self.known is not None:
            compressor.known, compressor.name = self.known, self.name
        return compressor


class _RecordedCache(MixKVCache):
    layer_class = _RecordedLayer


class _RecordingLayer(MixKVLayer):
    """Records the arguments of `compress`."""

    def compress(self, query, key, value, output, valid, options, measured=None):
        last = slice(-self.state.config.window, None)
        held = (query[:, :, last].clone(), key, value, output[:, last].clone())
        self.recorded = (self.module(), *held, valid, options, measured or Measured())
        super().compress(query, key, value, output, valid, options, measured)


class _RecordingCache(MixKVCache):
    layer_class = _RecordingLayer
