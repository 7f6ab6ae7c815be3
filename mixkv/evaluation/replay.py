"""One reading of a prompt, many caches: what attention saw is recorded once and compressed again by any configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from ..cache import MixKVCache
from ..config import MixKVConfig
from ..layer import MixKVLayer
from .measure import bind, end_tokens, last_logits_only


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

    def compressed(self, config: MixKVConfig | None) -> MixKVCache:
        """The cache that reading the prompt under ``config`` leaves; None: the full cache.

        Raises:
            ValueError: ``config.window`` exceeds the recorded window.
        """
        cache = MixKVCache(self.model, config or self.cache.config)
        for index, (layer, recorded) in enumerate(zip(cache.layers, self._inputs)):
            if isinstance(layer, MixKVLayer):
                layer.adopt(*recorded)
            else:
                cache.layers[index] = copy.deepcopy(recorded)
        return cache

    @torch.no_grad()
    def follow(self, cache: MixKVCache, input_ids: torch.Tensor) -> torch.Tensor:
        """Feeds tokens [B, n] after the prompt at once, each seeing those before it: logits [B, n, V]."""
        bind(self.model, cache)
        return self.model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits

    @torch.no_grad()
    def answer(self, first: torch.Tensor, count: int) -> torch.Tensor:
        """Greedy tokens [1, n <= count] of the full cache after tokens ``first`` [1, f], end-of-text token included."""
        ends = end_tokens(self.model)
        cache, fed, tokens = self.compressed(None), first, []
        while len(tokens) < count and (not tokens or tokens[-1] not in ends):
            fed = self.follow(cache, fed)[:, -1:].argmax(-1)
            tokens.append(int(fed))
        return torch.tensor([tokens], device=first.device)


class _RecordingLayer(MixKVLayer):
    """Keeps what `compress` is given."""

    def compress(self, query, key, value, output, valid, options):
        last = slice(-self.shared.config.window, None)
        self.recorded = (self.module(), query[:, :, last].clone(), key, value, output[:, last].clone(), valid, options)
        super().compress(query, key, value, output, valid, options)


class _RecordingCache(MixKVCache):
    layer_class = _RecordingLayer
