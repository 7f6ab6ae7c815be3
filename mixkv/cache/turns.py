"""Later turns of a conversation: where one ends, and what is kept of it, or of everything held, when it has been read.

Functions here that take a ``layer`` take a `MixKVLayer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import registry
from ..config import MixKVConfig
from ..hf import call_stack
from ..selection.budget import base_entries
from ..selection.context import FIRST, Measured
from .parts import WholePrompt
from .row_scores import RowScores
from .turn import Turn

if TYPE_CHECKING:
    from .state import CacheState


def begin_prompt(state: CacheState, tokens: int) -> int:
    """The length of the prompt whose first forward reads so many ``tokens``, drafts left out; the state has it if it is another.

    Raises:
        RuntimeError: as `begin`.
    """
    if state.expected_prompt is None:
        state.prompt_length, assisted = call_stack.prompt_plan(tokens)
        state.rollback_enabled |= assisted
    else:
        state.prompt_length, state.expected_prompt = state.expected_prompt, None
    if state.prompt_length is not None and state.prompt_length < tokens:
        check_drafts(state.config, state.prompt_length, tokens)
    return state.prompt_length or tokens


def begin(state: CacheState, seen: int, tokens: int) -> Turn | None:
    """The turn that a forward of so many ``tokens`` begins after ``seen`` ones; None: its tokens are not compressed together.

    Raises:
        RuntimeError: the turn may come in several forwards or with drafts, and its length cannot be found; or it comes with
            drafts, which the method does not take.
    """
    config = state.config
    if config.turns == "first":
        return None
    length, state.expected_prompt = state.expected_prompt, None
    if length is None:
        length, assisted = call_stack.prompt_plan(tokens, seen)
        state.rollback_enabled |= assisted
        # Tokens that may be taken back are not evicted, and a loop that drafts for itself does not say which they are.
        if length is None and state.rollback_enabled and not call_stack.in_generate():
            return None
    length = length or tokens
    if length <= (config.window if config.turns == "each" else 1):
        return None
    if length < tokens:
        check_drafts(config, length, tokens)
    return Turn(seen, seen + length)


def take_drafts(config: MixKVConfig) -> bool:
    """Whether drafts of assisted decoding may be read in the forward of the prompt or turn."""
    return registry.method(config.method).drafts_with_prompt and not registry.score(config.score).needs_replay


def check_drafts(config: MixKVConfig, length: int, tokens: int) -> None:
    """Raises a RuntimeError if the method cannot read the drafts that came with a prompt or turn of so many tokens."""
    if not take_drafts(config):
        raise RuntimeError(
            f"a prompt of {length} tokens came in one forward with {tokens - length} more, which would be read beside rows that "
            f"method={config.method!r}, score={config.score!r} has not chosen for all layers yet: read the prompt alone. In assisted "
            f"decoding it is, with a cache made by MixKVCache(model, ...) or by mixkv.patch(model)"
        )


def enforce_budgets(layer, query: torch.Tensor, output: torch.Tensor, valid: torch.Tensor | None, end: int) -> None:
    """Evicts what exceeds the turn's budget, if ``layer`` has just read its last token, and the decode budget.

    Args:
        query: [B, Hq, n, D], of the new tokens.
        output: attention's [B, n, Hq, Dv] for them.
        valid: bool [B, n], False for padding; None: there is none.
        end: the position after the last of them.
    """
    state, turn = layer.state, layer.state.turn
    if turn is None or end > turn.end:
        if state.keeps_window:
            layer.append_query_window(query, valid)
        finished = [layer]
    else:
        if layer.ordinal == 0:
            turn.count(query.shape[0], query.shape[2], valid)
        if state.keeps_window or end < turn.end or layer.window is not None:
            layer.append_query_window(query, valid)
        if end < turn.end:
            return
        query = query if layer.window is None else layer.window.query
        layer.window = layer.window if state.keeps_window else None
        if registry.score(state.config.score).needs_replay and not _is_kept_whole(layer, turn):
            _await_replay(layer, query, output)
            return
        finished = compress(layer, query, output)
    if not state.rollback_enabled:
        for done in finished:
            done.evict_to_decode_budget()


def _await_replay(layer, query: torch.Tensor, output: torch.Tensor) -> None:
    """Has the turn that has been read repeated, before it is compressed."""
    turn, store, last = layer.state.turn, layer.store, slice(-layer.state.config.window, None)
    length, real = turn.end - turn.first, torch.tensor(turn.real, device=query.device)
    key, value, held = store.padded(max(length + FIRST, store.max_length))
    # The tokens that everything rests on are visible in a replay; they are the first that each head holds.
    first = key.shape[2] - store.lengths.view(store.batch, -1, 1).long() + torch.arange(FIRST, device=key.device)
    key, value = (
        torch.cat([part.gather(2, first.unsqueeze(-1).expand(-1, -1, -1, part.shape[3])), part[:, :, -length:]], dim=2)
        for part in (key, value)
    )
    padding = length - real
    valid = torch.arange(length, device=key.device) >= padding.unsqueeze(-1) if int(padding.max()) > 0 else None
    layer.prompt = WholePrompt(
        key, value, query[:, :, last].detach().clone(), output[:, last].detach().clone(), valid, layer.logits, FIRST
    )
    layer.state.progress.awaits = "the replay of a turn"


def compress_replayed(layer, prompt: WholePrompt) -> None:
    """`compress`, after the turn that ``prompt`` is of has been repeated."""
    layer.prompt = None
    for done in compress(layer, prompt.query, prompt.output, prompt.replay[:, :, prompt.before :]):
        done.evict_to_decode_budget()


def compress_prompt(layer, prompt: WholePrompt) -> None:
    """Compresses a prompt that has been repeated; where rows compete again after later turns, keeps what was measured of them."""
    measured = prompt.measured()
    layer.compress(prompt.query, prompt.key, prompt.value, prompt.output, prompt.valid, prompt.logits, measured=measured)
    if layer.state.config.turns == "all":
        replay = measured.replay
        every = torch.arange(replay.shape[2], dtype=torch.int32, device=replay.device).expand(replay.shape)
        layer.scores = RowScores(at := layer.store.padded_positions(), RowScores(every, replay).of(at))


def compress(layer, query: torch.Tensor, output: torch.Tensor, replay: torch.Tensor | None = None) -> list:
    """Evicts from ``layer`` what the turn that it has just read to its end is not to leave.

    Args:
        query: [B, Hq, n, D], the last ones: a window of them, or all that there were.
        output: attention's [B, n, Hq, Dv] for the last tokens.
        replay: float32 [B, Hkv, tokens of the turn], what a replay of the turn measured; None: it has not been repeated.

    Returns: the layers of which that is done: where layers share a budget, all of them with the last, and until then none.
    """
    state, store, turn = layer.state, layer.store, layer.state.turn
    config, compressor, remote = state.config, layer.compressor(), layer.remote
    newest = torch.tensor(turn.real, device=query.device) if config.turns == "each" else None
    if _is_kept_whole(layer, turn):
        return [layer]
    if layer.ordinal == 0:
        limits = _candidates(layer, replay is not None) if newest is None and compressor.method.cross_layer else None
        state.shared_budget = compressor.new_shared_budget(limits)
    budget, length, longest = state.shared_budget, None, None
    if remote is not None:
        longest = remote.lengths(store.lengths.view(store.batch, -1).long()).amax(dim=-1)
        length = int(longest.max())
    key, value, valid = store.padded(length)
    if store.even and remote is None:
        valid = None
    measured = None
    if replay is not None:
        score = torch.nn.functional.pad(replay, (key.shape[2] - replay.shape[2], 0))
        if layer.scores is not None:
            score = score.maximum(layer.scores.of(at := layer.store.padded_positions()))
            layer.scores = RowScores(at, score)
        measured = Measured(score)
    ranking = compressor.rank(query, key, value, layer.logits, valid, longest, newest, measured)
    entries, fixed = compressor.allocate(ranking, output, budget, remote, newest)
    selection = ranking.take(compressor.shard.own(entries))
    store.keep(selection, key.shape[2])
    if layer.scores is not None:
        layer.scores = RowScores(at := layer.store.padded_positions(), layer.scores.of(at))
    layer.remote = compressor.remote_heads(entries, key.device, fixed)
    if budget is None:
        return [layer]
    budget.finish_layer(layer, selection)
    if budget.complete:
        state.shared_budget = None
    return budget.finished


def _candidates(first, stored: bool) -> np.ndarray:
    """The candidates of all heads, int64 [B, layers, all heads]; ``stored``: not only the ``first`` layer has stored the new tokens."""
    state = first.state
    layers = [layer for layer in state.cache().layers if getattr(layer, "state", None) is state]
    new = torch.tensor(state.turn.new).unsqueeze(-1)
    rows = []
    for layer in layers:
        own = layer.store.lengths.view(layer.store.batch, -1).long().cpu()
        held = own if layer.remote is None else layer.remote.lengths(own.to(layer.remote.beyond.device)).cpu()
        rows.append(held + (0 if stored or layer is first else new))
    return (torch.stack(rows, dim=1) - state.config.window).clamp(min=0).numpy()


def _is_kept_whole(layer, turn: Turn) -> bool:
    """Whether no batch row's turn exceeds its budget."""
    if layer.state.config.turns == "all":
        return False
    real, config = torch.tensor(turn.real), layer.state.config
    key, value = (torch.empty(0, size, dtype=layer.dtype) for size in layer.shape[1:])
    place = {"heads": layer.compressor().shard.total, "num_layers": layer.state.num_layers}
    return bool((real - config.window <= base_entries(config, real, key, value, **place)).all())
