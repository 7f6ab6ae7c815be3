"""CacheLayer: the part of a layer that transformers calls."""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from ..hf.attention import MARK
from .held import HeldEntries


class CacheLayer(HeldEntries, CacheLayerMixin):
    """What a layer holds under the transformers cache-layer protocol.

    Attributes:
        arrived: tokens that came with the last forward.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    arrived: int

    def evict_to_decode_budget(self) -> None:
        """Evicts what exceeds the decode budget."""
        raise NotImplementedError

    @property
    def keys(self) -> torch.Tensor:
        """What is stored, in this layer's own shape; models ask only whether there is something."""
        holder = self.store or self.prompt
        return torch.empty(0) if holder is None else holder.key

    @property
    def values(self) -> torch.Tensor:
        holder = self.store or self.prompt
        return torch.empty(0) if holder is None else holder.value

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.shape = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Hands the new keys and values on to the attention function, marked; it stores what is to be kept."""
        if self.state.replay is not None:
            return self._marked(key_states), value_states.view_as(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        shape = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        if shape != self.shape:
            raise ValueError(
                f"this cache holds {self.shape[0]} KV heads of size {self.shape[1]}/{self.shape[2]} and was given {shape[0]} of size "
                f"{shape[1]}/{shape[2]}: it belongs to another model. Make a new MixKVCache(model)"
            )
        self.arrived = key_states.shape[2]
        if self.prompt is not None:
            key_states, value_states = self.prompt.joined(key_states, value_states)
        self.seen += self.arrived
        self.state.pending_layer = self
        return self._marked(key_states), value_states.view_as(value_states)

    def _marked(self, key_states: torch.Tensor) -> torch.Tensor:
        key_states = key_states.view_as(key_states)
        setattr(key_states, MARK, self)
        return key_states

    def get_seq_length(self) -> int:
        """Tokens seen, not rows stored."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """While a prompt is being read the mask spans all of it; later only the new block: every stored row is visible."""
        if self.rows is None and self.state.replay is None:
            return self.seen + query_length, 0
        return query_length, self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def check_crop(self, count: int) -> None:
        """Raises a ValueError if `crop` would for this ``count``."""
        count = self._tokens_to_remove(count)
        if count > 0 and (self.rows is None or self.state.reads_turn(self.seen)):
            what = "turn" if self.rows else "prompt"
            raise ValueError(f"cannot crop {count} tokens: the {what} has not been read to its end")
        if count > 0:
            self.store.check_crop(count)

    def crop(self, count: int) -> None:
        """Takes back the last ``-count`` tokens; a positive ``count`` is the length to crop to, as before transformers 5.15."""
        self.check_crop(count)
        count = self._tokens_to_remove(count)
        if count > 0:
            self.store.crop(count)
            self.seen -= count
            if self.window is not None:
                self.window.crop(count)
        self.evict_to_decode_budget()

    def _tokens_to_remove(self, count: int) -> int:
        # transformers before 5.23 gives a tensor.
        count = int(count)
        return max(self.seen - count, 0) if count > 0 else -count

    def take_rows(self, rows: list[int]) -> None:
        """Makes batch row i a copy of former row ``rows[i]``."""
        for part in self.parts:
            part.take_rows(rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.take_rows(beam_idx.tolist())

    def offload(self) -> None:
        raise ValueError("a compressed cache is not offloaded: leave offloading out; it holds few rows")

    prefetch = offload
