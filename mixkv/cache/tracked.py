"""TrackedCache: a transformers cache that knows of every forward whether it has reached all layers, and undoes what it can."""

from __future__ import annotations

import copy
import itertools
import weakref

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..hf import stock_layers
from .layer import MixKVLayer
from .progress import Progress
from .state import Before, CacheState

_NEVER_MET = (
    "the attention of {} never met its compressed cache, so nothing would be compressed. Either the model was unpatched while "
    "the cache was in use (bind again with MixKVCache(model) or mixkv.patch(model), and call cache.reset()), or an earlier forward "
    "was cut off by an exception (call cache.reset()), or its attention does not go through transformers' attention interface "
    "(not supported)"
)


class TrackedCache(Cache):
    """What `MixKVCache` does so that an exception leaves it as it was, or broken in so many words; see `Progress`."""

    layer_class = MixKVLayer

    _state: CacheState
    _batch: int | None
    _model_name: str
    # A stock layer for each layer that is not compressed, else None.
    _slots: list[CacheLayerMixin | None]

    @property
    def usable(self) -> bool:
        """False after an exception that left the layers with different tokens: then everything but `reset` raises."""
        return self._state.pending_layer is None and self._state.progress.idle

    def _check_usable(self) -> None:
        self._check_met()
        self._state.progress.check()
        self._end_steps()

    def _end_steps(self) -> None:
        """Makes the layers ready for anything but compiled steps."""

    def _check_met(self) -> None:
        if self._state.pending_layer is not None:
            raise RuntimeError(_NEVER_MET.format(self._model_name))

    def _make_layers(self) -> None:
        ordinals = itertools.count()
        self.layers = [
            self.layer_class(self._state, next(ordinals)) if slot is None else copy.deepcopy(slot) for slot in self._slots
        ]
        self._state.progress = self._new_progress()
        if self._state.rollback_enabled:
            self.activate_past_recording()

    def _new_progress(self) -> Progress:
        attention, linear = [], []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, MixKVLayer) or getattr(layer, "is_sliding", False):
                attention.append(index)
            elif stock_layers.is_bounded(layer):
                linear.append(index)
        return Progress(attention, linear)

    def _start_forward(self) -> None:
        state = self._state
        seen = next(layer.seen for layer in self.layers if isinstance(layer, MixKVLayer))
        state.before = Before(seen, self._batch, state.prompt_length, state.rollback_enabled, state.expected_prompt, state.turn)
        state.cache, state.storing = weakref.ref(self), False

    def _undo_forward(self) -> None:
        """After an exception in a forward: the cache is as before it, if that is still known; else its `Progress` is unfinished."""
        state, before = self._state, self._state.before
        state.pending_layer = None
        if before is None or state.progress.complete:
            return
        if before.seen > 0 and (state.storing or not state.progress.at_first_layer):
            return
        if before.seen > 0:
            layer = self.layers[state.progress.current]
            if not isinstance(layer, MixKVLayer):
                return
            layer.seen = before.seen
        else:
            state.shared_budget, state.rollback_enabled = None, before.rollback_enabled
            self._make_layers()
        self._batch, state.prompt_length = before.batch, before.prompt_length
        state.expected_prompt, state.turn = before.expected_prompt, before.turn
        if before.images is not None:
            state.images = before.images
        state.progress.forget()

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
        if self._is_tracked() and self._state.progress.touch_state(layer_idx, method, state_idx):
            self._start_forward()

    def _is_tracked(self) -> bool:
        return not torch.compiler.is_compiling() and self._state.replay is None

    def _finish_state(self, method: str, layer_idx: int, result):
        if self._is_tracked():
            self._state.progress.finish_state(layer_idx, method)
        return result
