"""MixKVLayer: one attention layer's KV entries under the transformers cache-layer protocol."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from transformers.cache_utils import CacheLayerMixin

from .. import registry
from ..hf.attention import MARK
from ..ops.arguments import LogitOptions
from ..selection.context import Measured
from . import turns
from .attention_call import AttentionCall
from .compress import Compressor, row_totals
from .held import HeldEntries
from .parts import PARTS, Part, PromptSoFar, QueryWindow, WholePrompt, from_earlier
from .refit import PendingRefit
from .row_scores import RunningImportance
from .state import CacheState


class MixKVLayer(HeldEntries, CacheLayerMixin):
    """The KV entries of one attention layer: all of them while its prompt is being read in chunks, then those kept.

    Attributes:
        state: what the layers of a cache share.
        ordinal: which of the compressed layers this is.
        module: the attention module it belongs to, once known.
        arrived: tokens that came with the last forward.
        logits: how the model computes its logits, once the prompt has been read.
        pending_refit: what values are refitted with once the budget of all layers has been allocated; None: nothing is.
    """

    pending_refit: PendingRefit | None = None

    is_step = False
    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False
    compressor_class = Compressor

    def __init__(self, state: CacheState, ordinal: int):
        self.state, self.ordinal = state, ordinal
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.seen = self.arrived = 0
        self.shape = None
        self.module: weakref.ref | None = None
        self.logits: LogitOptions | None = None
        self.pending_refit = None
        for name in PARTS:
            setattr(self, name, None)

    def __getstate__(self) -> dict[str, Any]:
        self.count_steps()
        return {**self.__dict__, "module": None, "_steps": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # mixkv 0.1.0 pickled the logit options as a dictionary, and the contents of the parts one by one.
        if "options" in state:
            options = state.pop("options")
            state = {**state, "state": state.pop("shared"), "logits": LogitOptions(**options) if options else None}
        self.__dict__.update(from_earlier(state) if "query_tail" in state else state)

    # The transformers protocol.

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

    def restore(
        self, parts: dict[str, Part | None], *, seen: int, shape: tuple, dtype, device, logits: LogitOptions, module
    ) -> None:
        """Goes on from ``parts`` as the layer did that held them after ``seen`` tokens; see `mixkv.cache.save`."""
        self.shape, self.dtype, self.device, self.is_initialized = shape, dtype, device, True
        self.seen, self.logits, self.module = seen, logits, weakref.ref(module)
        for name, part in parts.items():
            setattr(self, name, part)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.take_rows(beam_idx.tolist())

    def offload(self) -> None:
        raise ValueError("a compressed cache is not offloaded: leave offloading out; it holds few rows")

    prefetch = offload

    # What the attention function calls.

    @property
    def replaying(self) -> bool:
        """Whether the present forward repeats a part of the prompt."""
        return self.state.replay is not None

    @property
    def prompt_length(self) -> int | None:
        return self.state.prompt_length

    def attention_call(self, module: torch.nn.Module, kwargs: dict) -> AttentionCall:
        """A context for what the attention function of ``module`` does with the keys that `update` handed out."""
        return AttentionCall(self, module, kwargs)

    def append_prefill_chunk(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Holds a prompt whose end is still to come: key, value [B, Hkv, tokens so far, D], query [B, Hq, new tokens, D]."""
        self.state.storing = True
        self.prompt = PromptSoFar(key.detach(), value.detach())
        self.append_query_window(query)

    def compress(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        valid: torch.Tensor | None,
        logits: LogitOptions,
        measured: Measured | None = None,
    ) -> None:
        """Keeps the selected entries of a whole prompt, or all until it has been replayed.

        key, value [B, Hkv, N, D]; query [B, Hq, n, D] and attention's output [B, n, Hq, Dv] are of at least the last tokens;
        ``valid`` bool [B, N], False for padding; ``measured``: what was measured on the prompt beside them.
        """
        self.state.storing = True
        compressor, state = self.compressor(), self.state
        if state.keeps_window or self.window is not None:
            self.append_query_window(query)
            query = self.window.query
        if measured is None and registry.score(state.config.score).needs_replay:
            last = slice(-state.config.window, None)
            query, output = query[:, :, last].detach().clone(), output[:, last].detach().clone()
            self.prompt = WholePrompt(key.detach(), value.detach(), query, output, valid, logits)
            self.window = self.window if state.keeps_window else None
            state.progress.awaits = "the replay of a prompt"
            return
        if self.ordinal == 0:
            state.shared_budget = compressor.new_shared_budget()
        budget, image = state.shared_budget, state.images.of_prompt
        found = compressor.compress(
            query.detach(), key, value, output, logits, valid=valid, image=image, shared_budget=budget, measured=measured
        )
        self.rows, self.statistics, self.remote = found.rows, found.statistics, found.remote
        if budget is not None:
            budget.finish_layer(self, found.selection)
            if budget.complete:
                state.shared_budget = None
        self.prompt, self.logits = None, logits
        if state.config.refit:
            asked = measured.queries if measured is not None else None
            given = (query, key, value, output, valid, logits, state.config.window)
            self.pending_refit = PendingRefit.of_prompt(*given, asked)
            for layer in [self] if budget is None else budget.finished:
                layer.refit()
        if not state.keeps_window:
            self.window = None

    def replay(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: LogitOptions) -> torch.Tensor:
        """Attention of tokens that repeat a part of the prompt: [B, n, Hq, Dv]; their keys and values are not kept."""
        part, prompt = self.state.replay, cast(WholePrompt, self.prompt)
        prompt.samples.add(query, part.scored)
        return part.attend(prompt, query, key, value, logits)

    def compress_replayed(self) -> None:
        """`compress`, after the replay."""
        prompt = cast(WholePrompt, self.prompt)
        if self.rows is not None:
            turns.compress_replayed(self, prompt)
        else:
            turns.compress_prompt(self, prompt)

    def refit(self) -> None:
        """Refits the values of the rows, which are those that stay."""
        self.pending_refit.apply(self.store, self.logits, self.statistics.dynamic)
        self.pending_refit = None

    def fill(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        valid: torch.Tensor | None,
        logits: LogitOptions,
        measured: Measured | None = None,
    ) -> None:
        """`compress` for an empty layer, as if a forward of ``module`` had just brought these tokens."""
        self.module = weakref.ref(module)
        self.lazy_initialization(key, value)
        self.seen = self.arrived = key.shape[2]
        self.compress(query, key, value, output, valid, logits, measured)

    @property
    def drafts(self) -> int:
        """Tokens that came behind the end of the turn being read."""
        turn = self.state.turn
        return 0 if turn is None else max(self.seen - turn.end, 0)

    def decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: int, logits: LogitOptions
    ) -> torch.Tensor:
        """`Rows.decode`."""
        self.state.storing = True
        return self.rows.decode(query, key, value, position, logits)

    def extend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position: int,
        mask: torch.Tensor | None,
        valid: torch.Tensor | None,
        logits: LogitOptions,
    ) -> torch.Tensor:
        """`Rows.extend`."""
        start = self.state.start_storing
        return self.rows.extend(query, key, value, position, logits, mask=mask, valid=valid, before_storing=start)

    def enforce_budgets(self, query: torch.Tensor, output: torch.Tensor, valid: torch.Tensor | None, end: int) -> None:
        turns.enforce_budgets(self, query, output, valid, end)

    def append_query_window(self, query: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Keeps the last window of queries; where tokens may be taken back, as many more as the forward brought."""
        self.window = self.window or QueryWindow()
        self.window.append(query, self.state.config.window + (self.arrived if self.state.rollback_enabled else 0), valid)

    def evict_to_decode_budget(self) -> None:
        """Evicts what exceeds the decode budget, by the last window of queries."""
        if self.state.config.decode_budget is not None and self.rows is not None:
            if self.state.config.decode_decay > 0 and self.running is None:
                self.running = RunningImportance.empty(self.store.batch, self.store.heads, self.device)
            held = (self.window.query, self.store, self.logits, self.statistics.share, self.remote, self.running)
            self.remote = self.compressor().enforce_decode_budget(*held)

    def compressor(self) -> Compressor:
        """One that chooses what this layer keeps."""
        module = self.module and self.module()
        compressor = self.compressor_class(self.state.config, self.ordinal, self.state.num_layers, module, self.shape[0])
        if self.state.gate is not None:
            compressor.gate = self.state.gate.layers[self.ordinal].to(self.device)
        return compressor

    # What the budget that layers share calls.

    @property
    def row_totals(self) -> list[int]:
        """Rows of every batch row, those of heads in other processes included."""
        return row_totals(self.store, self.remote)

    @property
    def share(self) -> list[float] | None:
        """For every batch row, this layer's rows to those of the average layer; None: all layers alike."""
        return None if self.statistics is None else self.statistics.share

    @share.setter
    def share(self, share: list[float] | None) -> None:
        self.statistics.share = share

    def evict(self, ranks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`RaggedStore.evict` down to ``rows`` [B, all heads of the layer]."""
        if self.remote is None:
            return self.store.evict(ranks, rows.flatten())
        compressor = self.compressor()
        self.remote = compressor.remote_heads(rows, self.device, self.remote.fixed)
        return self.store.evict(ranks, compressor.shard.own(rows).flatten())
