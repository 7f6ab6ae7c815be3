"""read: a context becomes a compressed cache, for questions that come later."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import registry
from .cache import MixKVCache
from .cache.replay import count_parts
from .config import MixKVConfig, checked_config
from .hf import binding
from .hf.versions import cache_argument, last_logits_only

# Longer texts are read in several forwards, of so many tokens.
_LONG, _FORWARD = 16384, 4096
# Inputs of a context without images.
_OF_TEXT = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids"}
# A progress bar is shown if there are more forwards than this.
_FORWARDS = 4


def default_config(*, images: bool = False) -> MixKVConfig:
    """How `read` compresses a context, with or without ``images``, if it is given no config.

    A replay scores every token, so that of the last ones only a few are kept without being asked for. Values are refitted for
    texts; of pages a replay keeps so much of what is asked that refitting changes little.
    """
    return MixKVConfig(score="replay", window=8, refit=not images)


@torch.no_grad()
def read(
    model: nn.Module,
    *,
    cache: MixKVCache | None = None,
    config: MixKVConfig | None = None,
    progress: bool | None = None,
    **inputs_and_options: Any,
) -> MixKVCache:
    """Reads a context and compresses it, by default so that questions which nobody has asked yet can be answered.

    Args:
        model: a transformers model, on one device or several.
        cache: an unused cache of the model, to be filled; or one that has read something and compresses later turns
            (``MixKVConfig(turns=...)``), which takes the context as its next page, frame or chunk; None: a new one is made by
            ``config`` and the options.
        config: a `MixKVConfig`; None: `default_config`, which is ``method="global"``, ``score="replay"``, ``window=8``, and for texts
            ``refit=True``.
        progress: whether to show a progress bar; None: if there is much to read.
        inputs_and_options: fields of `MixKVConfig`, such as ``budget``, in place of those of ``config``; all others are inputs of
            ``model.generate``: input_ids or inputs_embeds, attention_mask (padding on the left), pixel_values, ... For a cache that
            has read something: inputs of ``model``, those of the new tokens alone, with the attention_mask of all tokens if there
            was padding before.

    Returns: the cache. ``model.generate(input_ids, cache=copy.deepcopy(cache))`` with the ids of the context and of a question
        goes on from a copy of it, so that it serves any number of questions.

    Raises:
        ValueError: no context, a cache that has read something, or bad options.

    Example:
        >>> context = tokenizer(text, return_tensors="pt")
        >>> cache = mixkv.read(model, **context, budget=0.13)
        >>> whole = tokenizer(text + question, return_tensors="pt")
        >>> model.generate(**whole, cache=copy.deepcopy(cache))
    """
    inner = binding.unwrap(model)
    names = {field.name for field in dataclasses.fields(MixKVConfig)}
    options = {name: value for name, value in inputs_and_options.items() if name in names}
    inputs = {name: value for name, value in inputs_and_options.items() if name not in names}
    context = inputs.get("inputs_embeds", inputs.get("input_ids"))
    if not torch.is_tensor(context):
        raise ValueError("read was given no context: pass what the tokenizer or the processor returns, read(model, **inputs)")
    if cache is None:
        config = default_config(images=not inputs.keys() <= _OF_TEXT) if config is None else config
        cache = MixKVCache(inner, checked_config(config, **options))
    elif config is not None or options:
        raise ValueError(f"read was given a cache and options for another ({', '.join(options) or 'config'}): leave one out")
    elif cache and cache.config.turns == "first":
        raise ValueError(
            f"this cache has read {cache.get_seq_length()} tokens: give an unused one, call cache.reset(), or make it with turns='each' "
            f"or turns='all', to go on reading"
        )
    else:
        cache._bind(inner)
    length = context.shape[1]
    alone = inputs.keys() <= {"input_ids", "attention_mask"}
    size = _FORWARD if length > _LONG and alone else None
    generation = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    with _Bar(inner, length, _forwards(cache.config, length, size), progress):
        if cache:
            _read_on(inner, cache, inputs, length, size)
            return cache
        inner.generate(**inputs, **generation, prefill_chunk_size=size, **cache_argument(cache))
    return cache


def _read_on(model: PreTrainedModel, cache: MixKVCache, inputs: dict[str, Any], length: int, size: int | None) -> None:
    """Reads ``length`` more tokens, in forwards of ``size``; None: in one."""
    seen, mask = cache.get_seq_length(), inputs.pop("attention_mask", None)
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (seen + length - mask.shape[1], 0), value=1)
    mask = None if mask is None or mask.all() else mask
    if mask is not None and "position_ids" not in inputs:
        inputs["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, seen:]
    inputs |= last_logits_only(model)
    cache.expect_prompt(length)
    for start in range(0, length, size or length):
        end = min(start + (size or length), length)
        given = dict(inputs)
        if end - start < length:
            given |= {name: inputs[name][..., start:end] for name in ("input_ids", "position_ids") if name in inputs}
        if mask is not None:
            given["attention_mask"] = mask[:, : seen + end]
        model(**given, **cache_argument(cache), use_cache=True)


def _forwards(config: MixKVConfig, length: int, size: int | None) -> int:
    """Forwards of the decoder, each of about as many tokens, that reading takes."""
    reading = 1 if size is None else -(-length // size)
    return reading + (count_parts(length, config.replay_chunk) if registry.score(config.score).needs_replay else 0)


class _Bar:
    """A progress bar that counts the forwards of a model's decoder, for the length of a with-block."""

    def __init__(self, model: PreTrainedModel, length: int, forwards: int, shown: bool | None):
        self.decoder, self.length, self.forwards = model.get_decoder(), length, forwards
        self.shown = forwards > _FORWARDS if shown is None else shown

    def __enter__(self) -> None:
        if self.shown:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.forwards, desc=f"reading {self.length:,} tokens")
            # Before the hook that repeats a prompt, whose forwards count after the prompt's own.
            self.hook = self.decoder.register_forward_hook(self._count, prepend=True)

    def _count(self, *_) -> None:
        self.bar.update()

    def __exit__(self, *_) -> None:
        if self.shown:
            self.hook.remove()
            self.bar.close()
