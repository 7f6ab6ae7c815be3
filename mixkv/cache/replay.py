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

from ..hf import stock_layers
from ..hf.decoder_inputs import DecoderHook, DecoderInputs
from ..hf.versions import CACHE_ARGUMENT, cache_argument
from ..ops.arguments import LogitOptions
from ..ops.replay_attention import replay_attention
from .layer import MixKVLayer
from .parts import FIRST, WholePrompt

# Tokens before a part that are read with it, to announce it.
CUE = 8


@dataclass(frozen=True)
class ReplayPart:
    """The part of a prompt [B, N] that one forward repeats: m tokens of the context are visible, and n tokens are read.

    Attributes:
        visible: int64 [B, m], their positions in the prompt; shown: bool [B, m], which of them exist.
        index: int64 [B, n], the positions of the tokens that are read again: the last ones before the part, and the part.
        scored: bool [B, p + n], the tokens of the part among those, p tokens of an instruction before them.
    """

    visible: torch.Tensor
    shown: torch.Tensor
    index: torch.Tensor
    scored: torch.Tensor

    def attend(
        self, prompt: WholePrompt, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: LogitOptions
    ) -> torch.Tensor:
        """Attention of the tokens read, [B, p + n, Hq, Dv]; ``prompt.replay`` has the weights afterwards."""
        visible, shown, scored = (part.to(key.device) for part in (self.visible, self.shown, self.scored))
        heads = key.shape[1]
        rows = visible[:, None, :].expand(-1, heads, -1)
        context_key, context_value = (
            part.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, part.shape[3])) for part in (prompt.key, prompt.value)
        )
        output, score = replay_attention(
            query, context_key, context_value, key, value, visible=shown, scored=scored, **vars(logits)
        )
        # What is not shown stands for no token: it adds nothing to the token that it names.
        prompt.replay.scatter_reduce_(2, rows, score * shown[:, None, :], "amax")
        return output


def count_parts(length: int, size: int) -> int:
    """The parts of at most ``size`` tokens in which so many tokens are repeated."""
    return -(-length // size)


def parts(batch: int, length: int, padding: torch.Tensor | None, size: int, prefix: int) -> Iterator[ReplayPart]:
    """A prompt [batch, length] in parts of at most ``size`` tokens, a batch row in the parts that it has alone.

    Args:
        padding: int64 [batch], the padding on the left of each batch row; None: there is none.
        prefix: tokens that are read before those of a part.
    """
    start = torch.zeros(batch, dtype=torch.long) if padding is None else padding.cpu()
    real = length - start
    count = (real + size - 1) // size
    step = (real + count - 1) // count
    first = torch.arange(min(FIRST, length)).expand(batch, -1) + start[:, None]
    for number in range(int(count.max())):
        begin = (start + number * step).clamp(max=length)
        end = (begin + step).clamp(max=length)
        columns = torch.arange(int((end - begin).max()))
        index = begin[:, None] + columns
        exists = index < end[:, None]
        index = index.clamp(max=length - 1)
        visible, shown = index, exists
        if number > 0:
            visible = torch.cat([first.clamp(max=length - 1), index], dim=1)
            shown = torch.cat([first < length, exists], dim=1)
        cue = min(CUE, int(step.min())) if number > 0 else 0
        before = begin[:, None] + torch.arange(-cue, 0)
        scored = torch.nn.functional.pad(exists, (prefix + cue, 0))
        yield ReplayPart(visible, shown, torch.cat([before.clamp(0, length - 1), index], dim=1), scored)


@torch.no_grad()
def replay(cache, decoder: nn.Module, inputs: DecoderInputs, size: int, instruction: torch.Tensor | None = None) -> None:
    """Repeats the prompt that ``cache`` holds whole, and compresses it.

    Time grows in proportion to the number of parts: each sees the prompt's first tokens, its own and those read again.

    Args:
        cache: a `MixKVCache` whose layers hold a `WholePrompt`.
        decoder: of the model.
        inputs: what it was given for the prompt.
        size: tokens of a part.
        instruction: int64 [p], token ids that come before every part.
    """
    state = cache._state
    layers = [layer for layer in cache.layers if isinstance(layer, MixKVLayer)]
    held = cache.layers
    batch, length = layers[0].batch, layers[0].seen
    valid = cast(WholePrompt, layers[0].prompt).valid
    padding = None if valid is None else (~valid).sum(dim=1)
    inputs.join()
    prefix = torch.zeros(batch, 0, dtype=torch.long) if instruction is None else instruction.expand(batch, -1)
    try:
        for part in parts(batch, length, padding, size, prefix.shape[1]):
            cache.layers = [copy.deepcopy(layer) if stock_layers.is_bounded(layer) else layer for layer in held]
            state.replay = part
            arguments = inputs.take(part.index, prefix, decoder.get_input_embeddings())
            if valid is not None:
                mask = torch.ones(batch, part.scored.shape[1], dtype=torch.bool, device=valid.device)
                arguments["attention_mask"] = torch.cat([valid, mask], dim=1)
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
        if any(isinstance(layer, MixKVLayer) and layer.rows is not None for layer in cache.layers):
            # What follows a prompt is not repeated.
            self.remove()
        else:
            self.inputs.append(arguments, cache.get_seq_length())

    def after(self, arguments: dict[str, Any]) -> None:
        """The decoder has been called. If the prompt has been read to its end, it is repeated and compressed."""
        cache, decoder = self.cache(), self.decoder()
        ours = cache is not None and arguments.get(CACHE_ARGUMENT) is cache and cache._state.replay is None
        if not ours or cache._state.progress.awaits is None:
            return
        self.remove()
        inputs, self.inputs = self.inputs, DecoderInputs()
        replay(cache, decoder, inputs, cache.config.replay_chunk)
        cache._state.progress.awaits = None
