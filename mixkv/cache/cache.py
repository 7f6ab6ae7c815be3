"""MixKVCache: the transformers cache protocol over layers of ragged stores. All that a generation knows lives in its cache."""

from __future__ import annotations

import copy
import itertools
import os
import warnings
import weakref
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .. import head_profile
from ..config import MixKVConfig
from ..hf import binding, call_stack, versions
from ..hf.image_tokens import ImageColumns
from ..registry import CONTESTS
from . import save, stats
from .layer import MixKVLayer
from .state import Shared

_NEVER_MET = (
    "the attention of {} never met its compressed cache, so nothing would be compressed. Either the model was unpatched while "
    "the cache was in use (bind again with MixKVCache(model) or mixkv.patch(model)), or an earlier forward was interrupted (make a "
    "new cache), or its attention does not go through transformers' attention interface (not supported)"
)


class MixKVCache(Cache):
    """A transformers cache that compresses a prompt once it has been read, and holds everything generated after it.

    Example:
        >>> cache = mixkv.MixKVCache(model, method="adakv", score="mix", budget=128)
        >>> model.generate(**inputs, past_key_values=cache)
        >>> cache.stats()["ratio"]

    Args:
        model: the model it is for; without one the cache binds itself to the model that first uses it.
        config: a `MixKVConfig`.
        options: fields of `MixKVConfig`, over ``config``.

    Raises:
        ValueError: unknown or bad options, or a model that cannot be compressed.
    """

    layer_class = MixKVLayer

    def __init__(self, model: PreTrainedModel | None = None, config: MixKVConfig | None = None, **options):
        for name in ("offloading", "offload_only_non_sliding"):
            if options.pop(name, None):
                raise ValueError(f"{name}=True is not supported: a compressed cache stays where its keys are. Leave it out")
        if model is not None and not isinstance(model, torch.nn.Module):
            raise ValueError(
                f"model must be a transformers model, not {type(model).__name__}; a config goes by name: config=..."
            )
        self.config = (config or MixKVConfig()).replace(**options)
        self._shared = Shared(self.config)
        self._batch: int | None = None
        self._model: weakref.ref | None = None
        super().__init__(layers=[])
        if model is not None:
            self._bind(model)

    def _bind(self, model: PreTrainedModel) -> None:
        model = binding.unwrap(model)
        if self.config.method == "sparsemm":
            head_profile.check_model(self.config.profile, model.config.model_type)
        self._slots = binding.bind(model)
        self._shared.num_layers = sum(slot is None for slot in self._slots)
        self._model_name, self._model = type(model).__name__, weakref.ref(model)
        self._make_layers()
        if self._shared.recording:
            self.activate_past_recording()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def _make_layers(self) -> None:
        ordinals = itertools.count()
        self.layers = [
            self.layer_class(self._shared, next(ordinals)) if slot is None else copy.deepcopy(slot) for slot in self._slots
        ]

    @torch.compiler.disable
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        if self._shared.waiting is not None:
            raise RuntimeError(_NEVER_MET.format(self._model_name))
        if not self.layers:
            self._bind_to_caller()
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"this cache was made for a {self._model_name} of {len(self.layers)} layers and met layer {layer_idx}: make a new "
                f"MixKVCache(model) for this model"
            )
        batch = key_states.shape[0]
        if self._batch not in (None, batch):
            raise ValueError(
                f"this cache holds a batch of {self._batch} and was given {batch} rows: make a new cache, or take rows with "
                f"cache.batch_select_indices / batch_repeat_interleave"
            )
        layer = self.layers[layer_idx]
        first = isinstance(layer, MixKVLayer) and layer.ordinal == 0
        if first:
            self._shared.valid.clear()
        if first and layer.dense is None:
            columns = key_states.shape[2]
            if layer.seen == 0:
                self._shared.prompt_length, assisted = call_stack.prompt_plan()
                self._shared.recording |= assisted
                columns = self._shared.prompt_length or columns
            self._shared.images.read(layer.seen, columns, key_states)
            if self.config.method in CONTESTS and layer.seen == 0 and columns < key_states.shape[2]:
                # They are read beside rows that layers to come have had no say in yet: not what greedy decoding would see.
                call_stack.decline_drafts()
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._batch = batch
        if versions.holds_view(layer):
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        return result

    def __bool__(self) -> bool:
        """Whether anything has been read. (phi3 throws away a cache that is true and short: one not yet used must be false.)"""
        return any(isinstance(layer, MixKVLayer) and layer.seen for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, not rows stored."""
        length = super().get_seq_length(layer_idx)
        # A compiled forward is not the place where a cache is thrown away, and its frames cannot be looked at.
        limit = None if torch.compiler.is_compiling() else call_stack.thrown_away_at(length)
        if limit is not None:
            warnings.warn(
                f"transformers throws this compressed cache away: beyond {limit} tokens a {self._model_name} changes its rotary "
                f"embedding and reads everything again, into a cache of its own that is not compressed. Keep prompt and answer "
                f"within {limit} tokens, or give the first prompt more than {limit}"
            )
        return length

    def _bind_to_caller(self) -> None:
        model = call_stack.calling_model()
        if model is None:
            raise RuntimeError("this cache cannot tell which model is using it: make it with MixKVCache(model, ...)")
        self._bind(model)

    def activate_past_recording(self) -> None:
        self._shared.recording = True
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reset(self) -> None:
        if self.layers:
            self._make_layers()
        self._batch = None
        self._shared.prompt_length = self._shared.waiting = self._shared.global_budget = None
        self._shared.recording = False
        self._shared.images = ImageColumns()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._take(beam_idx.tolist(), "reorder_cache", beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = torch.arange(self._batch or 0, device=indices.device)[indices].tolist()
        self._take(rows, "batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = [row for row in range(self._batch or 0) for _ in range(repeats)]
        self._take(rows, "batch_repeat_interleave", repeats)

    def _take(self, rows: list[int], stock_method: str, argument) -> None:
        """Takes batch rows: read to the host once for all our layers; stock layers take them their own way."""
        for layer in self.layers:
            if isinstance(layer, MixKVLayer):
                layer.take_rows(rows)
            else:
                device = getattr(layer, "device", None)
                here = argument.to(device) if torch.is_tensor(argument) and device is not None else argument
                getattr(layer, stock_method)(here)
        self._shared.images.take_rows(rows)
        if self._batch is not None:
            self._batch = len(rows)

    def set_image_mask(self, mask: torch.Tensor) -> None:
        """Says which columns of the next prompt or turn are image tokens, where `stats` cannot tell from the token ids.

        That is so with ``inputs_embeds``, and for models whose config names no image token.

        Args:
            mask: [B, N], nonzero for image tokens; N columns, padding included.

        Raises:
            ValueError: now if it is not two-dimensional, at the next forward if it does not fit what is read.
        """
        self._shared.images.give(mask)

    def kept(self, layer_idx: int) -> list[list[torch.Tensor]] | None:
        """Columns of the sequence as passed that layer ``layer_idx`` holds: [B][Hkv] ascending int32 tensors.

        None for a layer that this library does not compress (sliding window, cross-attention, ...). In a tensor-parallel model
        Hkv are the heads of this process.
        """
        self._check_met()
        layer = self.layers[layer_idx]
        return layer.kept() if isinstance(layer, MixKVLayer) else None

    def stats(self) -> dict[str, Any]:
        """What is held: see `mixkv.report.stats`."""
        self._check_met()
        return stats.stats(self)

    def save(self, path: str | os.PathLike) -> None:
        """Saves what is held, as one safetensors file that `load` reads; a file at ``path`` is replaced once all is written.

        Raises:
            ValueError: nothing is held yet, the prompt has not been read to its end, a layer of the model keeps a state of
                an unknown kind, or the model is tensor-parallel.
            OSError: the file cannot be written.
        """
        self._check_met()
        save.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, model: PreTrainedModel, *, backend: str | None = None) -> MixKVCache:
        """A cache as it was when `save` wrote ``path``, on the devices of ``model``: it goes on with the same tokens.

        Args:
            path: the file.
            model: the model it was saved from, loaded anew if you like; it is bound as by `MixKVCache(model)`.
            backend: as in `MixKVConfig`, for a machine that has not the saved one's.

        Raises:
            ValueError: the file is damaged, no saved cache, of another format, or another model's; the message says which.
            OSError: the file cannot be read.
        """
        saved = save.read(path)
        model = binding.unwrap(model)
        cache = cls(model, saved.config if backend is None else saved.config.replace(backend=backend))
        save.restore(cache, saved, model)
        return cache

    def _check_met(self) -> None:
        if self._shared.waiting is not None:
            raise RuntimeError(_NEVER_MET.format(self._model_name))

    def __repr__(self) -> str:
        return stats.text(self)

    def _repr_html_(self) -> str:
        return stats.html(self)
