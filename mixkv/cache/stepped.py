"""SteppedCache: a cache whose decode steps are one compiled graph each.

A prompt is read and compressed as without it. A decode step then goes to `run_step`, which stands before the compiled call of
`generate`: rows move to an arena once, and the graph appends to it and attends. It reads and writes tensors only; what the host
counts is brought up to date when it is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .. import registry
from ..config import MixKVConfig
from ..hf import versions
from ..hf.fixed_window import FixedWindow
from ..storage.arena import ArenaStore, Region
from ..storage.counted import Steps
from ..storage.ragged import RaggedStore
from . import workspace
from .layer import MixKVLayer
from .tracked import TrackedCache

# Rows of room for each sequence where it is not known how many tokens will come.
_ROOM = 256


class SteppedCache(TrackedCache):
    """What `MixKVCache` does with ``compile=True``."""

    config: MixKVConfig
    # Whether a compiled step is running, or being traced.
    _stepping = False
    # What a step uses of each layer; empty while decoding is not in compiled steps.
    _regions: list[Any]
    _refused: str | None = None
    _steps: Steps | None = None
    # Tokens when generation ends; tokens that sequences have room for.
    _final_length: int | None = None
    _room = _left = 0

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile decode steps: ``compile=True``, and nothing stands against it."""
        return self.config.compile and self._refused is None and bool(self.layers)

    def _check_compileable(self, model: PreTrainedModel) -> None:
        """Warns if ``compile=True`` cannot be done."""
        self._regions = []
        if self.config.compile:
            self._refused = _refusal(self.config, model, self._slots)
            if self._refused is not None:
                _warn(self._refused)

    def expect_length(self, length: int) -> None:
        """Says that compiled steps follow, until so many tokens have been seen."""
        self._final_length = length

    def refuse_compiling(self, what: str) -> None:
        """Warns that ``what`` is not compiled, if it should be."""
        if self.is_compileable:
            self._refused = what
            _warn(what)

    def run_step(self, model: PreTrainedModel, compiled: Callable, inputs: dict[str, Any]) -> Any:
        """A forward of ``model`` with ``inputs``, by ``compiled`` where that is a decode step."""
        if not self._is_step(inputs):
            return model(**inputs)
        if not self._regions or self._left < 1:
            self._start_steps(model)
        inputs = {**inputs, "attention_mask": self._fixed_mask(inputs.get("attention_mask"))}
        with self._state.progress.changing("a compiled decode step"):
            self._stepping = True
            try:
                output = compiled(**inputs)
            finally:
                self._stepping = False
        cast(Steps, self._steps).count += 1
        self._left -= 1
        return output

    def _is_step(self, inputs: dict[str, Any]) -> bool:
        """Whether ``inputs`` are one token for each batch row of a prompt that has been compressed."""
        if (
            not self.is_compileable
            or not self.usable
            or self._state.rollback_enabled
            or torch.is_grad_enabled()
            or inputs.get("output_attentions")
        ):
            return False
        new = inputs.get("input_ids")
        new = inputs.get("inputs_embeds") if new is None else new
        if new is None or new.shape[:2] != (self._batch, 1):
            return False
        ours = [layer for layer in self.layers if isinstance(layer, MixKVLayer)]
        if not all(isinstance(layer.store, RaggedStore) and layer.chunks is None for layer in ours) or self._state.reads_turn(
            ours[0].seen
        ):
            return False
        # The last queries are kept in a tensor of a fixed size.
        if self._state.keeps_window and ours[0].window.query.shape[2] < self.config.window:
            return False
        # A window that is not full is masked by columns, which only masks with queries have, one a kind of layer.
        mask = inputs.get("attention_mask")
        return not any(self.is_sliding) or (isinstance(mask, dict) and all(map(_is_block, mask.values())))

    def _start_steps(self, model: PreTrainedModel) -> None:
        """Moves all rows to where compiled steps find them, unless they are there and have room."""
        space = workspace.acquire(model, self)
        ours = [layer for layer in self.layers if isinstance(layer, MixKVLayer)]
        stores, seen = [cast(RaggedStore, layer.rows.resident) for layer in ours], ours[0].seen
        held = [store for store in stores if isinstance(store, ArenaStore) and store.in_arena]
        if len(held) < len(stores) or min(store.spare for store in held) < 1:
            wanted = (self._final_length or 0) - seen
            # A sequence that has outgrown its room gets twice as much.
            self._room = wanted if wanted > 0 else max(2 * self._room, _ROOM)
            least = self.config.budget if isinstance(self.config.budget, int) else 0
            steps = Steps()
            held = space.take(stores, least, self._room, steps)
            self._steps = steps
            for layer, store in zip(ours, held):
                layer.rows.resident = store
                layer.follow(steps)
        for layer, store in zip(ours, held):
            store.count_evicted(seen)
            store.region.keep_queries(layer.window.query if self._state.keeps_window else None)
        self._left = min(store.spare for store in held)
        regions = iter(store.region for store in held)
        self._regions = [self._region(space, index, regions) for index in range(len(self.layers))]
        self._window_steps = cast(Steps, self._steps).count

    def _region(self, space: workspace.Workspace, index: int, regions) -> Region | FixedWindow | None:
        layer = self.layers[index]
        if isinstance(layer, MixKVLayer):
            return next(regions)
        return space.window(index, layer) if isinstance(layer, DynamicSlidingWindowLayer) else None

    def _end_steps(self) -> None:
        """Makes the layers ready for anything but compiled steps."""
        for layer, region in zip(self.layers, self._regions):
            if isinstance(region, FixedWindow):
                region.give_back(layer, cast(Steps, self._steps).count - self._window_steps)
            elif isinstance(region, Region) and region.queries is not None:
                layer.window.query = region.queries.clone()
        self._regions = []

    def _fixed_mask(self, mask: Any) -> Any:
        """``mask`` in a shape that does not grow: with a column for every row of the windows of sliding-window layers."""
        if torch.is_tensor(mask) and mask.ndim == 2:
            # It says which tokens are padding, and the new ones are not.
            return None
        window = next((region for region in self._regions if isinstance(region, FixedWindow)), None)
        if window is None:
            return mask
        return {kind: part if kind == "full_attention" else window.padded_mask(part) for kind, part in mask.items()}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        if self._stepping:
            return self._regions[layer_idx].update(key_states, value_states)
        return self._update(key_states, value_states, layer_idx, *args, **kwargs)

    def _update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        raise NotImplementedError

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen, not rows stored; in a compiled step a tensor."""
        if self._stepping:
            return next(region for region in self._regions if isinstance(region, Region)).tokens_seen()
        if self._regions and isinstance(self._regions[layer_idx], FixedWindow):
            return self._tokens_seen()
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Any]:
        if self._stepping:
            return query_length, self.get_seq_length()
        region = self._regions[layer_idx] if self._regions else None
        if isinstance(region, FixedWindow) and query_length > 1:
            self._end_steps()
        elif isinstance(region, FixedWindow):
            return region.mask_sizes(self._tokens_seen())
        return super().get_mask_sizes(query_length, layer_idx)

    def _tokens_seen(self) -> int:
        return next(layer.seen for layer in self.layers if isinstance(layer, MixKVLayer))


def _refusal(config: MixKVConfig, model: PreTrainedModel, slots: list[CacheLayerMixin | None]) -> str | None:
    """What of a cache cannot be compiled; None: nothing."""
    if registry.method(config.method).keeps_chunks:
        return f"method={config.method!r}"
    if registry.row_format(config.rows).packs:
        return f"rows={config.rows!r}"
    if config.decode_budget is not None:
        return f"decode_budget={config.decode_budget}"
    if versions.tensor_parallel_mesh(model) is not None:
        return "tensor parallelism"
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    others = {type(slot).__name__ for slot in slots if slot is not None and type(slot) not in known}
    return f"a model with a {', '.join(sorted(others))}" if others else None


def _warn(what: str) -> None:
    warnings.warn(f"compile=True does not go with {what}: decoding is not compiled", stacklevel=2)


def _is_block(mask: Any) -> bool:
    return torch.is_tensor(mask) and mask.ndim == 4
