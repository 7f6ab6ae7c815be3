"""Replay: a model repeats the prompt that it has read, which shows what a later question can need of it.

KVzip (arXiv 2505.23416): the prompt is compressed by the largest attention weight that each token gets while it is repeated.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .. import registry
from ..config import MixKVConfig
from ..hf import stock_layers
from ..hf.decoder_inputs import DecoderHook, DecoderInputs
from ..hf.versions import CACHE_ARGUMENT, cache_argument
from ..ops.arguments import LogitOptions
from ..ops.replay_attention import replay_attention
from ..selection.context import FIRST
from .layer import MixKVLayer
from .parts import WholePrompt

# Tokens before a part that are read with it, to announce it.
CUE = 8


@dataclass(frozen=True)
class ReplayPart:
    """The part of a prompt [B, N] that one forward repeats: m tokens of the context are visible, and n tokens are read.

    Attributes:
        visible: int64 [B, m], their positions in the prompt; shown: bool [B, m], which of them exist; None: all do.
        index: int64 [B, n], the positions of the tokens that are read again: the last ones before the part, and the part.
        scored: bool [B, n], which of those are the part.
    """

    visible: torch.Tensor
    shown: torch.Tensor | None
    index: torch.Tensor
    scored: torch.Tensor

    def attend(
        self, prompt: WholePrompt, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: LogitOptions
    ) -> torch.Tensor:
        """Attention of the tokens read, [B, n, Hq, Dv]; ``prompt.replay`` has the weights afterwards."""
        device = key.device
        visible, scored = self.visible.to(device), self.scored.to(device)
        shown = None if self.shown is None else self.shown.to(device)
        rows = visible[:, None, :].expand(-1, key.shape[1], -1)
        context_key, context_value = (
            part.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, part.shape[3])) for part in (prompt.key, prompt.value)
        )
        output, score = replay_attention(
            query, context_key, context_value, key, value, visible=shown, scored=scored, **vars(logits)
        )
        prompt.replay.scatter_reduce_(2, rows, score, "amax")
        return output


def count_parts(length: int, size: int) -> int:
    """The parts of at most ``size`` tokens in which so many tokens are repeated."""
    return -(-length // size)


def parts(batch: int, length: int, padding: torch.Tensor | None, size: int, before: int = 0) -> Iterator[ReplayPart]:
    """A prompt [batch, length] in parts of at most ``size`` tokens, a batch row in the parts that it has alone.

    Args:
        padding: int64 [batch], the padding on the left of each batch row; None: there is none.
        before: rows held before those of the [batch, length] tokens, all of which are visible in every part.
    """
    start = torch.zeros(batch, 1, dtype=torch.long) if padding is None else padding.view(-1, 1)
    real = length - start
    step = -(-real // -(-real // size))
    first = (start + torch.arange(FIRST, device=start.device)).clamp(max=length - 1)
    cue = torch.arange(-CUE, 0, device=start.device)
    for number in range(count_parts(int(real.max()), size)):
        begin = (start + number * step).clamp(max=length)
        end = (begin + step).clamp(max=length)
        index = begin + torch.arange(int((end - begin).max()), device=start.device)
        exists = index < end
        index = index.clamp(max=length - 1)
        visible, shown, front = index + before, exists, None
        if before:
            front = torch.arange(before, device=start.device).expand(batch, -1)
        elif number > 0:
            front = first
        if front is not None:
            visible = torch.cat([front, visible], dim=1)
            shown = torch.nn.functional.pad(exists, (front.shape[1], 0), value=True)
        read, scored = index, exists
        if number > 0:
            read, scored = torch.cat([(begin + cue).maximum(start), index], dim=1), torch.nn.functional.pad(exists, (CUE, 0))
        yield ReplayPart(visible, None if shown.all() else shown, read, scored)


@torch.no_grad()
def replay(cache, decoder: nn.Module, inputs: DecoderInputs, size: int) -> None:
    """Repeats the prompt that ``cache`` holds whole, and compresses it.

    KVzip has the model read an instruction before every part. Without one the largest weights are as good, and no tokenizer is
    needed. Time grows in proportion to the number of parts: each sees the prompt's first tokens, its own and those read again.

    Args:
        cache: a `MixKVCache` whose layers hold a `WholePrompt`.
        decoder: of the model.
        inputs: what it was given for the prompt.
        size: tokens of a part.
    """
    state = cache._state
    layers = [layer for layer in cache.layers if isinstance(layer, MixKVLayer)]
    held = cache.layers
    prompt = cast(WholePrompt, layers[0].prompt)
    batch, length, valid = layers[0].batch, prompt.length, prompt.valid
    padding = None if valid is None else (~valid).sum(dim=1)
    inputs.join()
    try:
        for part in parts(batch, length, padding, size, prompt.before):
            cache.layers = [copy.deepcopy(layer) if stock_layers.is_bounded(layer) else layer for layer in held]
            state.replay = part
            arguments = inputs.take(part.index)
            if valid is not None:
                earlier = torch.ones(batch, layers[0].seen - length, dtype=torch.bool, device=valid.device)
                arguments["attention_mask"] = torch.cat([earlier, valid, torch.ones_like(part.scored)], dim=1)
            decoder(**arguments, **cache_argument(cache), use_cache=True)
    finally:
        state.replay, cache.layers = None, held
    for layer in layers:
        layer.compress_replayed()


class Replayer:
    """Sees what a decoder is given for the prompt of a cache, and has the prompt repeated when it has been read.

    Args:
        cache: a `MixKVCache`, which keeps this.
        decoder: of its model.
    """

    def __init__(self, cache, decoder: nn.Module):
        self.cache, self.inputs = weakref.ref(cache), DecoderInputs()
        self.decoder, self._hook = weakref.ref(decoder), DecoderHook(decoder, self)

    @property
    def reading(self) -> bool:
        """Whether the decoder has been given tokens of a prompt."""
        return len(self.inputs) > 0

    def remove(self) -> None:
        """The next prompt is not repeated."""
        self._hook.remove()

    def before(self, arguments: dict[str, Any]) -> None:
        """The decoder is about to be called with these arguments."""
        cache = self.cache()
        if cache is None or arguments.get(CACHE_ARGUMENT) is not cache or cache._state.replay is not None:
            return
        seen = cache.get_seq_length()
        in_prompt = all(layer.rows is None for layer in cache.layers if isinstance(layer, MixKVLayer))
        if not in_prompt and cache.config.turns == "first":
            # What follows a prompt is not repeated.
            self.remove()
            return
        if not in_prompt and not cache._state.reads_turn(seen):
            # Whether these tokens begin a turn shows later.
            self.inputs = DecoderInputs()
        self.inputs.append(arguments, seen)

    def after(self, arguments: dict[str, Any]) -> None:
        """The decoder has been called. If the prompt has been read to its end, it is repeated and compressed."""
        cache, decoder = self.cache(), self.decoder()
        ours = cache is not None and arguments.get(CACHE_ARGUMENT) is cache and cache._state.replay is None
        if not ours or cache._state.progress.awaits is None:
            return
        if cache.config.turns == "first":
            self.remove()
        inputs, self.inputs = self.inputs, DecoderInputs()
        replay(cache, decoder, inputs, cache.config.replay_chunk)
        cache._state.progress.awaits = None


def replayer(cache, former: Replayer | None) -> Replayer | None:
    """The one for the next prompt or turn of a `MixKVCache`, in place of ``former``; None: nothing will be repeated."""
    if former is not None:
        former.remove()
    model = cache._bound_to and cache._bound_to()
    waits = registry.score(cache.config.score).needs_replay and (not cache or cache.config.turns != "first")
    if not model or not waits:
        return None
    return Replayer(cache, model.get_decoder())


def check_watched(config: MixKVConfig, replayer: Replayer | None) -> None:
    """Checks that a prompt that the score needs a replay of has been seen from its start.

    Raises:
        RuntimeError: it has not.
    """
    if registry.score(config.score).needs_replay and (replayer is None or not replayer.reading):
        raise RuntimeError(
            f"score={config.score!r} repeats the prompt, and this cache did not see what the model's decoder was given: make it for "
            f"the model before the prompt, MixKVCache(model, ...), or use mixkv.read(model, **inputs, ...)"
        )
