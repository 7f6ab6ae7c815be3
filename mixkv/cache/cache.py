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

from .. import head_profile, registry
from ..config import MixKVConfig, checked_config
from ..hf import binding, call_stack, stock_layers
from ..hf.image_tokens import ImageTokens
from . import save, stats
from .layer import MixKVLayer
from .progress import Progress
from .state import Before, Shared

_NEVER_MET = (
    "the attention of {} never met its compressed cache, so nothing would be compressed. Either the model was unpatched while "
    "the cache was in use (bind again with MixKVCache(model) or mixkv.patch(model), and call cache.reset()), or an earlier forward "
    "was cut off by an exception (call cache.reset()), or its attention does not go through transformers' attention interface (not supported)"
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

    After an exception the cache is as it was before the call, or every later use of it raises a RuntimeError that says so, until
    `reset`. A prompt whose attention failed has not been read. A forward that fails behind its last cache layer has been read
    whole: `get_seq_length` counts its tokens.

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
        self.config = checked_config(config, **options)
        self._shared = Shared(self.config)
        self._batch: int | None = None
        self._model: weakref.ref | None = None
        self._bound_to: binding.ModelReference | None = None
        super().__init__(layers=[])
        if model is not None:
            self._bind(model)

    def _bind(self, model: PreTrainedModel) -> None:
        model = binding.unwrap(model)
        if registry.method(self.config.method).needs_profile:
            head_profile.check_model(self.config.profile, model.config.model_type)
        slots = binding.bind(model, self)
        self._bound_to = binding.ModelReference(model)
        if self.layers:
            # A cache that was unpickled, or whose model was loaded again: only the binding is new.
            return
        self._slots = slots
        self._shared.num_layers = sum(slot is None for slot in self._slots)
        self._model_name, self._model = type(model).__name__, weakref.ref(model)
        self._make_layers()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_bound_to": None, **state})
        if self._shared.progress is None:  # pickled by version 0.1.0
            self._shared.progress = self._new_progress()
        model = self._bound_to and self._bound_to()
        if model is not None:
            binding.add_holder(model, self)

    def _make_layers(self) -> None:
        ordinals = itertools.count()
        self.layers = [
            self.layer_class(self._shared, next(ordinals)) if slot is None else copy.deepcopy(slot) for slot in self._slots
        ]
        self._shared.progress = self._new_progress()
        if self._shared.recording:
            self.activate_past_recording()

    def _new_progress(self) -> Progress:
        attention, linear = [], []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, MixKVLayer) or getattr(layer, "is_sliding", False):
                attention.append(index)
            elif stock_layers.is_bounded(layer):
                linear.append(index)
        return Progress(attention, linear)

    @torch.compiler.disable
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        if self._shared.waiting is not None:
            raise RuntimeError(_NEVER_MET.format(self._model_name))
        if not self.layers or (layer_idx == 0 and (self._bound_to is None or self._bound_to() is None)):
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
        layer, progress = self.layers[layer_idx], self._shared.progress
        tracked = layer_idx in progress.attention
        if tracked and progress.start_layer(layer_idx, key_states.shape[2]):
            self._start_forward()
        try:
            if isinstance(layer, MixKVLayer) and layer.ordinal == 0:
                self._read_plan(layer, key_states)
            result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            self._batch = batch
            if stock_layers.keeps_prompt_alive(layer):
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        except BaseException:
            self._undo_forward()
            raise
        if tracked and not isinstance(layer, MixKVLayer):
            progress.finish_layer()
        return result

    def _read_plan(self, layer: MixKVLayer, key_states: torch.Tensor) -> None:
        """What the first compressed layer finds out for all of them about the tokens of a forward."""
        self._shared.valid.clear()
        if layer.dense is not None:
            return
        columns, images = key_states.shape[2], copy.copy(self._shared.images)
        if layer.seen == 0:
            self._plan_prompt(columns)
            columns = self._shared.prompt_length or columns
        self._shared.images.read(layer.seen, columns, key_states)
        self._shared.before.images = images

    def _start_forward(self) -> None:
        shared = self._shared
        seen = next(layer.seen for layer in self.layers if isinstance(layer, MixKVLayer))
        shared.before = Before(seen, self._batch, shared.prompt_length, shared.recording)
        shared.cache, shared.storing = weakref.ref(self), False

    def _undo_forward(self) -> None:
        """After an exception in a forward: the cache is as before it, if that is still known; else its `Progress` is unfinished."""
        shared, before = self._shared, self._shared.before
        shared.waiting = None
        if before is None or shared.progress.complete:
            return
        if before.seen > 0 and (shared.storing or not shared.progress.at_first_layer):
            return
        if before.seen > 0:
            layer = self.layers[shared.progress.current]
            if not isinstance(layer, MixKVLayer):
                return
            layer.seen = before.seen
        else:
            shared.contest, shared.recording = None, before.recording
            self._make_layers()
        self._batch, shared.prompt_length = before.batch, before.prompt_length
        if before.images is not None:
            shared.images = before.images
        shared.progress.forget()

    def get_conv_state(self, layer_idx: int, *args, **kwargs):
        self._touch_state("get_conv_state", layer_idx, *args, **kwargs)
        result = super().get_conv_state(layer_idx, *args, **kwargs)
        return self._finish_state("get_conv_state", layer_idx, result)

    def get_recurrent_state(self, layer_idx: int, *args, **kwargs):
        self._touch_state("get_recurrent_state", layer_idx, *args, **kwargs)
        result = super().get_recurrent_state(layer_idx, *args, **kwargs)
        return self._finish_state("get_recurrent_state", layer_idx, result)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        self._touch_state("update_conv_state", layer_idx, *args, **kwargs)
        result = super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        return self._finish_state("update_conv_state", layer_idx, result)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        self._touch_state("update_recurrent_state", layer_idx, *args, **kwargs)
        result = super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        return self._finish_state("update_recurrent_state", layer_idx, result)

    def _touch_state(self, method: str, layer_idx: int, state_idx: int = 0, *_, **__) -> None:
        if not torch.compiler.is_compiling() and self._shared.progress.touch_state(layer_idx, method, state_idx):
            self._start_forward()

    def _finish_state(self, method: str, layer_idx: int, result):
        if not torch.compiler.is_compiling():
            self._shared.progress.finish_state(layer_idx, method)
        return result

    def _plan_prompt(self, tokens: int) -> None:
        """Finds out, at the first forward of a prompt, which reads so many ``tokens``, how long the prompt is."""
        shared = self._shared
        if shared.expected_prompt is None:
            shared.prompt_length, assisted = call_stack.prompt_plan(tokens)
            shared.recording |= assisted
        else:
            shared.prompt_length = shared.expected_prompt
        drafts = shared.prompt_length is not None and shared.prompt_length < tokens
        if drafts and not registry.method(self.config.method).drafts_with_prompt:
            raise RuntimeError(
                f"a prompt of {shared.prompt_length} tokens came in one forward with {tokens - shared.prompt_length} more, which would "
                f"be read beside rows that method={self.config.method!r} has not chosen for all layers yet: read the prompt alone. In "
                f"assisted decoding it is, with a cache made by MixKVCache(model, ...) or by mixkv.patch(model)"
            )

    def expect_prompt(self, length: int) -> None:
        """Says how long the next prompt is, so that it is compressed when all of it has been read.

        Needed where you read a prompt in several forwards of your own; `generate` with ``prefill_chunk_size`` or assisted decoding
        needs it only in a transformers that this library does not know.

        Args:
            length: the length of the prompt in tokens, padding included, images as the tokens that stand for them.

        Raises:
            ValueError: it is not a positive int.
            RuntimeError: something has been read already.
        """
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"length={length!r} must be a positive int: the length of the prompt in tokens")
        if self:
            raise RuntimeError(
                f"expect_prompt({length}) came after {self.get_seq_length()} tokens had been read: call it before the prompt, or "
                f"after cache.reset()"
            )
        self._shared.expected_prompt = length

    @property
    def reads_prompt_alone(self) -> bool:
        """Whether drafts of assisted decoding must not come along with the prompt: layers share rows when all have been read."""
        return not registry.method(self.config.method).drafts_with_prompt and not self

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
        if model is None and self.layers:
            return
        if model is None:
            raise RuntimeError("this cache cannot tell which model is using it: make it with MixKVCache(model, ...)")
        self._bind(model)

    def activate_past_recording(self) -> None:
        self._shared.recording = True
        model = None if self.layers else call_stack.assisted_model()
        if model is not None:
            self._bind(model)
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reset(self) -> None:
        """Forgets everything that was read, and makes a broken cache usable."""
        shared = self._shared
        shared.progress.change = "reset()"
        self._batch = shared.prompt_length = shared.expected_prompt = None
        shared.waiting = shared.contest = shared.before = None
        shared.recording = False
        shared.images = ImageTokens()
        if self.layers:
            self._make_layers()
        else:
            shared.progress = Progress()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: more than were appended since the last compression; nothing is changed.
        """
        self._check_usable()
        for layer in self.layers:
            if isinstance(layer, MixKVLayer):
                layer.check_crop(tokens_to_remove)
        with self._shared.progress.changing("crop()"):
            super().crop(tokens_to_remove)

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
        self._check_usable()
        with self._shared.progress.changing(f"{stock_method}()"):
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
        self._check_usable()
        layer = self.layers[layer_idx]
        return layer.kept() if isinstance(layer, MixKVLayer) else None

    def stats(self) -> dict[str, Any]:
        """What is held: see `mixkv.report.stats`."""
        self._check_usable()
        return stats.stats(self)

    def save(self, path: str | os.PathLike) -> None:
        """Saves what is held, as one safetensors file that `load` reads; a file at ``path`` is replaced once all is written.

        Raises:
            ValueError: nothing is held yet, the prompt has not been read to its end, a layer of the model keeps a state of
                an unknown kind, or the model is tensor-parallel.
            OSError: the file cannot be written.
        """
        self._check_usable()
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

    @property
    def usable(self) -> bool:
        """False after an exception that left the layers with different tokens: then everything but `reset` raises."""
        return self._shared.waiting is None and self._shared.progress.idle

    def _check_usable(self) -> None:
        if self._shared.waiting is not None:
            raise RuntimeError(_NEVER_MET.format(self._model_name))
        self._shared.progress.check()

    def __repr__(self) -> str:
        return stats.text(self)

    def _repr_html_(self) -> str:
        return stats.html(self)
