"""MixKVLayer: one attention layer's rows under the transformers cache-layer protocol."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..hf.attention import MARK, check_caller
from ..ops.arguments import LogitOptions
from ..storage.ragged import RaggedStore
from .compress import Compression
from .state import Shared


class MixKVLayer(Compression, CacheLayerMixin):
    """The rows of one attention layer: dense while its prompt is being read in chunks, then a `RaggedStore`."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, shared: Shared, ordinal: int):
        self.shared, self.ordinal = shared, ordinal
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.seen = 0
        self.arrived = 0
        self.store = self.chunks = self.dense = self.query_tail = None
        self.redundancy = self.modal_redundancy = self.sparsity = self.dynamic = None
        self.share = self.spread = self.weighs_output = self.shape = self.module = None
        self.logits: LogitOptions | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "module": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # mixkv 0.1.0 pickled them as a dictionary.
        if "options" in state:
            options = state.pop("options")
            state["logits"] = LogitOptions(**options) if options else None
        self.__dict__.update(state)

    # The transformers protocol.

    @property
    def keys(self) -> torch.Tensor:
        """What is stored, in this layer's own shape; models ask only whether there is something."""
        if self.store is not None:
            return self.store.key
        return torch.empty(0) if self.dense is None else self.dense[0]

    @property
    def values(self) -> torch.Tensor:
        if self.store is not None:
            return self.store.value
        return torch.empty(0) if self.dense is None else self.dense[1]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.shape = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Hands the new keys and values on to the attention function, marked; it stores what is to be kept."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        shape = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        if shape != self.shape:
            raise ValueError(
                f"this cache holds {self.shape[0]} KV heads of size {self.shape[1]}/{self.shape[2]} and was given {shape[0]} of size "
                f"{shape[1]}/{shape[2]}: it belongs to another model. Make a new MixKVCache(model)"
            )
        self.arrived = key_states.shape[2]
        if self.dense is not None:
            key_states = torch.cat([self.dense[0], key_states], dim=2)
            value_states = torch.cat([self.dense[1], value_states], dim=2)
        self.seen += self.arrived
        self.shared.waiting = self
        key_states = key_states.view_as(key_states)
        setattr(key_states, MARK, self)
        return key_states, value_states.view_as(value_states)

    def get_seq_length(self) -> int:
        """Tokens seen, not rows stored."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """While a prompt is being read the mask spans all of it; later only the new block: every stored row is visible."""
        if self.store is None:
            return self.seen + query_length, 0
        return query_length, self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def check_crop(self, count: int) -> None:
        """Raises a ValueError if `crop` would for this ``count``."""
        count = self._tokens_to_remove(count)
        if count > 0 and self.store is None:
            raise ValueError(f"cannot crop {count} tokens: the prompt has not been read to its end")
        if count > 0:
            self.store.check_crop(count)

    def crop(self, count: int) -> None:
        """Takes back the last ``-count`` tokens; a positive ``count`` is the length to crop to, as before transformers 5.15."""
        self.check_crop(count)
        count = self._tokens_to_remove(count)
        if count > 0:
            self.store.crop(count)
            self.seen -= count
            if self.query_tail is not None:
                self.query_tail = self.query_tail[:, :, : self.query_tail.shape[2] - count]
        self._bound()

    def _tokens_to_remove(self, count: int) -> int:
        # transformers before 5.23 gives a tensor.
        count = int(count)
        return max(self.seen - count, 0) if count > 0 else -count

    def take_rows(self, rows: list[int]) -> None:
        """Makes batch row i a copy of former row ``rows[i]``."""
        if self.store is not None:
            self.store.take_rows(rows)
        if self.chunks is not None:
            self.chunks.take_rows(rows)
        if self.sparsity is not None:
            self.sparsity, self.dynamic = self.sparsity[rows], self.dynamic[rows]
        if self.dense is not None:
            self.dense = (self.dense[0][rows], self.dense[1][rows])
        if self.query_tail is not None:
            self.query_tail = self.query_tail[rows]
        if self.redundancy is not None:
            self.redundancy = self.redundancy[rows]
        if self.share is not None:
            self.share = [self.share[row] for row in rows]
        if self.spread is not None:
            self.spread.take_rows(rows)
        if self.modal_redundancy is not None:
            self.modal_redundancy = self.modal_redundancy[rows]

    def restore(
        self,
        store: RaggedStore,
        seen: int,
        redundancy: torch.Tensor,
        query_tail: torch.Tensor | None,
        logits: LogitOptions,
        module: torch.nn.Module | None,
    ) -> None:
        """Goes on from ``store`` as the layer did that filled it after ``seen`` tokens; see `mixkv.saving`."""
        self.dtype, self.device = store.key.dtype, store.key.device
        self.shape = (store.heads, store.key.shape[1], store.value.shape[1])
        self.is_initialized = True
        self.store, self.seen = store, seen
        self.redundancy, self.query_tail, self.logits = redundancy, query_tail, logits
        self.module = None if module is None else weakref.ref(module)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.take_rows(beam_idx.tolist())

    def offload(self) -> None:
        raise ValueError("a compressed cache is not offloaded: leave offloading out; it holds few rows")

    prefetch = offload

    # What the attention function calls.

    @property
    def prompt_length(self) -> int | None:
        return self.shared.prompt_length

    def arriving(self, module: torch.nn.Module, kwargs: dict) -> AttentionCall:
        """A context for what the attention function of ``module`` does with the keys that `update` handed out."""
        return AttentionCall(self, module, kwargs)

    def collect(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Holds the columns of a prompt whose end is still to come: key, value [B, Hkv, columns so far, D]."""
        self.shared.storing = True
        self.dense = (key.detach(), value.detach())
        self._remember(query)

    def adopt(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        valid: torch.Tensor | None,
        logits: LogitOptions,
    ) -> None:
        """`compress` for an empty layer, as if a forward of ``module`` had just brought these columns."""
        self.module = weakref.ref(module)
        self.lazy_initialization(key, value)
        self.seen = self.arrived = key.shape[2]
        self.compress(query, key, value, output, valid, logits)

    def decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: LogitOptions) -> torch.Tensor:
        """Stores the row of the token seen last, key, value [B, Hkv, 1, D], and attends: query [B, Hq, 1, D] to [B, 1, Hq, Dv]."""
        self.shared.storing = True
        if self.chunks is None:
            return self.store.append_attend(query, key, value, self.seen - 1, logits)
        self.store.append(key, value, self.seen - 1)
        return self.chunks.attend(self.store, query, self.store.lengths.view(self.store.batch, 1, -1), logits)

    def extend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        valid: torch.Tensor | None,
        logits: LogitOptions,
    ) -> torch.Tensor:
        """Attends over the stored rows and the n columns seen last, and stores these, padding left out.

        query [B, Hq, n, D], key, value [B, Hkv, n, D]; ``mask`` bool [B or 1, 1, n, n] in place of the causal mask; ``valid``
        [B, n], False for padding. Returns [B, n, Hq, Dv].
        """
        new = key.shape[2]
        column = self.seen - new
        if self.chunks is None:
            output = self.store.attend_extend(query, key, value, logits, mask=mask)
            self.shared.storing = True
            self.store.append(key, value, column, valid)
            return output
        # Each position chooses for itself, as it would in a forward of its own.
        before = self.store.lengths.view(self.store.batch, 1, -1).clone()
        self.shared.storing = True
        self.store.append(key, value, column, valid)
        if valid is None:
            added = torch.arange(1, new + 1, dtype=torch.int32, device=key.device).view(1, -1, 1)
        else:
            added = valid.cumsum(dim=-1, dtype=torch.int32).unsqueeze(-1)
        return self.chunks.attend(self.store, query, before + added, logits)

    def settle(self, query: torch.Tensor, valid: torch.Tensor | None) -> None:
        """After a continuation of queries [B, Hq, n, D], ``valid`` [B, n] of them real: holds the layer to its decode budget."""
        if self.shared.config.decode_budget is None:
            return
        self._remember(query, valid)
        if not self.shared.recording:
            self._bound()

    # What reports read.

    @property
    def batch(self) -> int:
        if self.store is not None:
            return self.store.batch
        return 0 if self.dense is None else self.dense[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by this layer, spare capacity and bookkeeping included."""
        held = [self.query_tail, self.redundancy, self.modal_redundancy, self.sparsity, self.dynamic, *(self.dense or ())]
        stores = sum(part.nbytes for part in (self.store, self.chunks) if part is not None)
        return stores + sum(t.untyped_storage().nbytes() for t in held if t is not None)

    @property
    def nbytes_outside(self) -> int:
        """Bytes of them that are not resident: chunks of dynamic heads under ``offload``."""
        outside = self.chunks is not None and self.shared.config.offload and self.chunks.pool.key.device.type == "cpu"
        return self.chunks.pool.nbytes if outside else 0

    @property
    def nbytes_full(self) -> int:
        """Bytes an uncompressed cache holds after the same tokens."""
        if not self.is_initialized:
            return 0
        heads, key_size, value_size = self.shape
        return self.batch * heads * self.seen * (key_size + value_size) * self.dtype.itemsize

    def lengths(self) -> torch.Tensor:
        """Rows resident, those of slots for chunks included: int64 [B, Hkv], on the CPU."""
        if self.store is not None:
            rows = self.store.lengths if self.chunks is None else self.store.lengths + self.chunks.chunk * self.chunks.slots
            return rows.view(self.store.batch, self.store.heads).long().cpu()
        return torch.full((self.batch, self.shape[0] if self.shape else 0), self.seen)

    def kept(self) -> list[list[torch.Tensor]]:
        """[B][Hkv] ascending columns held, those in chunks included."""
        if self.store is not None:
            resident = self.store.positions()
            return resident if self.chunks is None else self.chunks.join(resident)
        heads = self.shape[0] if self.shape else 0
        return [[torch.arange(self.seen, dtype=torch.int32) for _ in range(heads)] for _ in range(self.batch)]


class AttentionCall:
    """What an attention function does with a layer: checks before, and afterwards the layer is done or the forward is undone.

    Not a generator: one that an exception leaves open would run its handler when it is collected, in a later forward.
    """

    def __init__(self, layer: MixKVLayer, module: torch.nn.Module, kwargs: dict):
        self.layer, self.module, self.kwargs = layer, module, kwargs

    def __enter__(self) -> None:
        layer = self.layer
        layer.shared.waiting = None
        try:
            check_caller(layer.module and layer.module(), self.module, layer.seen, self.kwargs)
            layer.module = weakref.ref(self.module)
        except BaseException:
            self._undo()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is None:
            self.layer.shared.progress.finish_layer()
        else:
            self._undo()

    def _undo(self) -> None:
        cache = self.layer.shared.cache and self.layer.shared.cache()
        if cache is not None:
            cache._undo_forward()
