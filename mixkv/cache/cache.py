"""MixKVCache: the transformers cache protocol over layers that keep some of their KV entries."""

from __future__ import annotations

import copy
import os
import warnings
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .. import head_profile, registry
from ..config import MixKVConfig, checked_config
from ..hf import binding, call_stack, stock_layers
from ..hf.image_tokens import ImageTokens
from . import gates, save, stats, turns
from .layer import MixKVLayer
from .progress import Progress
from .replay import Replayer, check_watched, replayer
from .state import CacheState
from .stepped import SteppedCache


class MixKVCache(SteppedCache):
    """A transformers cache that compresses a prompt once it has been read, and keeps all tokens generated after it.

    Example:
        >>> cache = mixkv.MixKVCache(model, method="adakv", score="mix", budget=128)
        >>> model.generate(**inputs, cache=cache)
        >>> cache.stats()["ratio"]

    Args:
        model: the model it is for; without one the cache binds itself to the model that first uses it.
        config: a `MixKVConfig`.
        options: fields of `MixKVConfig`, in place of those of ``config``.

    After an exception the cache is as it was before the call, or every later use of it raises a RuntimeError that says so, until
    `reset`. A prompt whose attention failed has not been read. A forward that fails behind its last cache layer has been read
    whole: `get_seq_length` counts its tokens.

    Raises:
        ValueError: unknown or bad options, or a model that cannot be compressed.
    """

    def __init__(self, model: PreTrainedModel | None = None, config: MixKVConfig | None = None, **options):
        for name in ("offloading", "offload_only_non_sliding"):
            if options.pop(name, None):
                raise ValueError(f"{name}=True is not supported: a compressed cache stays where its keys are. Leave it out")
        if model is not None and not isinstance(model, torch.nn.Module):
            raise ValueError(
                f"model must be a transformers model, not {type(model).__name__}; pass a config by keyword: config=..."
            )
        self.config = checked_config(config, **options)
        self._state = CacheState(self.config)
        self._batch: int | None = None
        self._regions = []
        self._replayer: Replayer | None = None
        self._model: weakref.ref | None = None
        self._bound_to: binding.ModelReference | None = None
        super().__init__(layers=[])
        if model is not None:
            self._bind(model)

    def _bind(self, model: PreTrainedModel) -> None:
        model = binding.unwrap(model)
        if registry.method(self.config.method).needs_profile:
            head_profile.check_model(cast(head_profile.Table, self.config.profile), model.config.model_type)
        slots = binding.bind(model, self)
        if registry.score(self.config.score).needs_gate:
            self._state.gate = gates.of_model(model, self.config.gate)
        self._bound_to = binding.ModelReference(model)
        # The layers of a cache that was unpickled, or whose model was loaded again, stay: only the binding is new.
        if not self.layers:
            self._slots = slots
            self._state.num_layers = sum(slot is None for slot in self._slots)
            self._model_name, self._model = type(model).__name__, weakref.ref(model)
            self._make_layers()
            self._check_compileable(model)
        self._replayer = replayer(self, self._replayer)

    def __getstate__(self) -> dict[str, Any]:
        self._end_steps()
        return {**self.__dict__, "_model": None, "_replayer": None, "_steps": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_shared" in state:  # pickled by version 0.1.0
            state = {**state, "_state": state["_shared"]}
            del state["_shared"]
        self.__dict__.update({"_bound_to": None, "_replayer": None, "_regions": [], **state})
        if self._state.progress is None:
            self._state.progress = self._new_progress()
        model = self._bound_to and self._bound_to()
        if model is not None:
            binding.add_holder(model, self)
        self._replayer = replayer(self, self._replayer)

    @torch.compiler.disable
    def _update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        if self._state.replay is not None:
            return Cache.update(self, key_states, value_states, layer_idx, *args, **kwargs)
        self._check_met()
        self._end_steps()
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
        layer, progress = self.layers[layer_idx], self._state.progress
        tracked = layer_idx in progress.attention
        if tracked and progress.start_layer(layer_idx, key_states.shape[2]):
            self._start_forward()
        try:
            if isinstance(layer, MixKVLayer) and layer.ordinal == 0:
                self._read_plan(layer, key_states)
                if self._state.rollback_enabled:
                    self.refuse_compiling("assisted decoding")
            result = Cache.update(self, key_states, value_states, layer_idx, *args, **kwargs)
            self._batch = batch
            if not isinstance(layer, MixKVLayer) and stock_layers.keeps_prompt_alive(layer):
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        except BaseException:
            self._undo_forward()
            raise
        if tracked and not isinstance(layer, MixKVLayer):
            progress.finish_layer()
        return result

    def _read_plan(self, layer: MixKVLayer, key_states: torch.Tensor) -> None:
        """What the first compressed layer finds out for all of them about the tokens of a forward."""
        state, tokens = self._state, key_states.shape[2]
        state.valid.clear()
        if layer.prompt is not None or state.reads_turn(layer.seen):
            return
        if layer.seen == 0 or self.config.turns != "first":
            check_watched(self.config, self._replayer)
        images = copy.copy(state.images)
        if layer.seen == 0:
            tokens = turns.begin_prompt(state, tokens)
        else:
            state.turn = turns.begin(state, layer.seen, tokens)
            tokens = tokens if state.turn is None else max(tokens, state.turn.end - layer.seen)
        state.images.read(layer.seen, tokens, key_states)
        state.before.images = images

    def expect_prompt(self, length: int) -> None:
        """Says how long the next prompt is, so that it is compressed when all of it has been read.

        Needed where you read a prompt in several forwards of your own; `generate` with ``prefill_chunk_size`` or assisted decoding
        needs it only in a transformers that this library does not know. Where later turns are compressed
        (``MixKVConfig(turns=...)``), the same is true of them, between two turns.

        Args:
            length: the length of the prompt or turn in tokens, padding included, images as the tokens that stand for them.

        Raises:
            ValueError: it is not a positive int.
            RuntimeError: something has been read already, and later turns are not compressed; or a prompt or turn has not been
                read to its end.
        """
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"length={length!r} must be a positive int: the length of the prompt in tokens")
        if self and (self.config.turns == "first" or not self._between_turns):
            raise RuntimeError(
                f"expect_prompt({length}) came after {self.get_seq_length()} tokens had been read: call it before the prompt, or "
                f"after cache.reset()"
            )
        self._state.expected_prompt = length

    @property
    def _between_turns(self) -> bool:
        """Whether whatever was read has been read to its end."""
        ours = [layer for layer in self.layers if isinstance(layer, MixKVLayer)]
        return all(layer.prompt is None and not self._state.reads_turn(layer.seen) for layer in ours)

    @property
    def reads_prompt_alone(self) -> bool:
        """Whether drafts of assisted decoding must not come along with the prompt: layers share rows when all have been read."""
        return not turns.take_drafts(self.config) and (not self or self.config.turns != "first")

    def __bool__(self) -> bool:
        """Whether anything has been read. (phi3 throws away a cache that is true and short: one not yet used must be false.)"""
        return any(isinstance(layer, MixKVLayer) and layer.seen for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, not rows stored."""
        length = super().get_seq_length(layer_idx)
        # A compiled forward is not the place where a cache is thrown away, and its frames cannot be looked at.
        limit = None if self._stepping or torch.compiler.is_compiling() else call_stack.thrown_away_at(length)
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
            raise RuntimeError("it is not known which model uses this cache: make it with MixKVCache(model, ...)")
        self._bind(model)

    def activate_past_recording(self) -> None:
        self._end_steps()
        self._state.rollback_enabled = True
        model = None if self.layers else call_stack.assisted_model()
        if model is not None:
            self._bind(model)
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reset(self) -> None:
        """Forgets everything that was read, and makes a broken cache usable."""
        state = self._state
        state.progress.change, self._regions, self._final_length = "reset()", [], None
        self._batch = state.prompt_length = state.expected_prompt = None
        state.pending_layer = state.shared_budget = state.before = state.turn = None
        state.rollback_enabled = False
        state.images = ImageTokens()
        if self.layers:
            self._make_layers()
            self._replayer = replayer(self, self._replayer)
        else:
            state.progress = Progress()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: more than were appended since the last compression; nothing is changed.
        """
        self._check_usable()
        for layer in self.layers:
            if isinstance(layer, MixKVLayer):
                layer.check_crop(tokens_to_remove)
        with self._state.progress.changing("crop()"):
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.refuse_compiling("beam search")
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
        with self._state.progress.changing(f"{stock_method}()"):
            for layer in self.layers:
                if isinstance(layer, MixKVLayer):
                    layer.take_rows(rows)
                else:
                    device = getattr(layer, "device", None)
                    here = argument.to(device) if torch.is_tensor(argument) and device is not None else argument
                    getattr(layer, stock_method)(here)
            self._state.images.take_rows(rows)
            if self._state.turn is not None:
                self._state.turn.take_rows(rows)
            if self._batch is not None:
                self._batch = len(rows)

    def set_image_mask(self, mask: torch.Tensor) -> None:
        """Marks the image tokens of the next prompt or turn, where `stats` cannot find them in the token ids.

        That is so with ``inputs_embeds``, and for models whose config names no image token.

        Args:
            mask: [B, N], nonzero for image tokens; N tokens, padding included.

        Raises:
            ValueError: now if it is not two-dimensional, at the next forward if it does not fit what is read.
        """
        self._state.images.give(mask)

    def kept(self, layer_idx: int) -> list[list[torch.Tensor]] | None:
        """Positions, padding included, that layer ``layer_idx`` keeps: ``[B][Hkv]`` ascending int32 tensors.

        None for a layer that this library does not compress (sliding window, cross-attention, ...). In a tensor-parallel model
        Hkv are the heads of this process.
        """
        self._check_usable()
        layer = self.layers[layer_idx]
        return layer.kept() if isinstance(layer, MixKVLayer) else None

    def stats(self) -> dict[str, Any]:
        """What the cache holds, as a dict: see `mixkv.cache.stats.stats`."""
        self._check_usable()
        return stats.stats(self)

    def save(self, path: str | os.PathLike, *, about: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Saves what is held, as one safetensors file that `load` reads; a file at ``path`` is replaced once all is written.

        ``about``: JSON values of your own to go with it, such as the context's token ids; `mixkv.cache.save.read` has them.

        Raises:
            ValueError: nothing is held yet, the prompt has not been read to its end, a layer of the model keeps a state of
                an unknown kind, or the model is tensor-parallel.
            OSError: the file cannot be written.
        """
        self._check_usable()
        save.save(self, path, about)

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

    def __repr__(self) -> str:
        return stats.text(self)

    def _repr_html_(self) -> str:
        return stats.html(self)
