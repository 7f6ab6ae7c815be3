"""Agreement, time and memory of one model with different caches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from types import MappingProxyType
from typing import TypeVar

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..cache import MixKVCache
from ..cache.layer import MixKVLayer
from ..cache.stats import held_bytes as layer_bytes
from ..config import MixKVConfig
from ..hf import binding
from ..hf.stock_layers import is_full_attention
from ..hf.versions import cache_argument, last_logits_only
from ..patch import unpatch
from . import InputError, memory

Key = TypeVar("Key", bound=Hashable)

# Called at the start of each step of work, with a description and the total number of steps.
Progress = Callable[[str, int], None]


def no_progress(what: str, total: int) -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class Read:
    """The result of a prefill.

    Attributes:
        cache: of the prompt.
        logits: [B, V], of the first answer token.
        seconds: duration of the forward, compression included.
        compress_seconds: the part of it that compression took.
        first_token_seconds: from creating the cache to the id of the first token.
        peak_bytes: peak memory during the prefill minus the memory in use before it; None if not measured or unknown.
    """

    cache: Cache
    logits: torch.Tensor
    seconds: float
    compress_seconds: float
    first_token_seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Held:
    """The size of a cache: KV entries of all layers, KV heads and batch rows, their mean per KV head, and bytes."""

    rows: int
    rows_per_head: float
    bytes: int


@torch.no_grad()
def read_prompt(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: MixKVConfig | None,
    *,
    inputs: Mapping[str, torch.Tensor] = MappingProxyType({}),
    watch_memory: bool = False,
) -> Read:
    """Prefills a new cache with a prompt.

    A model that `mixkv.patch` was called on is unpatched.

    Args:
        input_ids: [B, N].
        config: of the compressed cache; None: the full cache.
        inputs: further inputs of the model, such as pixel_values.
        watch_memory: whether to measure ``peak_bytes``, see `memory`.
    """
    device = input_ids.device
    unpatch(model)
    options = {**inputs, **last_logits_only(model)}
    before = memory.start(device) if watch_memory else None
    synchronize(device)
    start = perf_counter()
    cache = DynamicCache(config=model.config) if config is None else _TimedCache(model, config)
    made = perf_counter()
    logits = model(input_ids=input_ids, **cache_argument(cache), use_cache=True, **options).logits[:, -1]
    synchronize(device)
    read = perf_counter()
    logits.argmax(-1).tolist()
    end = perf_counter()
    compressing = sum(layer.seconds for layer in cache.layers if isinstance(layer, _TimedLayer))
    return Read(cache, logits, read - made, compressing, end - start, memory.peak(device, before))


@torch.no_grad()
def step(model: PreTrainedModel, cache: Cache, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """One decode step with ``tokens`` [B]: the next logits [B, V], and the duration of the forward in seconds."""
    bind(model, cache)
    tokens = tokens.unsqueeze(1)
    synchronize(tokens.device)
    start = perf_counter()
    logits = model(input_ids=tokens, **cache_argument(cache), use_cache=True).logits
    synchronize(tokens.device)
    return logits[:, -1], perf_counter() - start


def greedy(model: PreTrainedModel, read: Read, count: int) -> list[int]:
    """The greedy answer to a prompt of batch size 1: at most ``count`` tokens, including the end-of-text token."""
    ends = end_tokens(model)
    tokens = [int(read.logits[0].argmax())]
    while len(tokens) < count and tokens[-1] not in ends:
        logits, _ = step(model, read.cache, torch.tensor(tokens[-1:], device=read.logits.device))
        tokens.append(int(logits[0].argmax()))
    return tokens


def end_tokens(model: PreTrainedModel) -> list[int | None]:
    """The ids that end an answer."""
    ends = model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


def rounds(
    model: PreTrainedModel, caches: dict[Key, Cache], tokens: torch.Tensor
) -> Iterator[dict[Key, tuple[torch.Tensor, float]]]:
    """Decode steps of several caches, interleaved, so that other load on the machine affects all of them.

    Args:
        tokens: [T, B]; round t feeds ``tokens[t]`` to every cache.

    Yields: for each round the result of `step` for each cache. Each round starts with another cache.
    """
    names = list(caches)
    for turn, fed in enumerate(tokens):
        first = turn % len(names)
        yield {name: step(model, caches[name], fed) for name in names[first:] + names[:first]}


def held(cache: Cache) -> Held:
    """The current size of a cache. KV entries are counted in full-attention layers only."""
    if isinstance(cache, MixKVCache):
        numbers = cache.stats()
        heads = sum(layer.numel() for layer in numbers["lengths"] if layer is not None)
        return Held(numbers["rows"], numbers["rows"] / heads, numbers["bytes"])
    keys = [layer.keys for layer in cache.layers if is_full_attention(layer)]
    rows = sum(tensor.shape[:3].numel() for tensor in keys)
    heads = sum(tensor.shape[:2].numel() for tensor in keys)
    return Held(rows, rows / heads, sum(map(layer_bytes, cache.layers)))


def equal_prefix(tokens: list[int], reference: list[int]) -> int:
    """The number of leading tokens that are equal."""
    unequal = (index for index, (one, other) in enumerate(zip(tokens, reference)) if one != other)
    return next(unequal, min(len(tokens), len(reference)))


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other), in nats and float32, between the distributions of logits [..., V]: [...]."""
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (reference, other))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def median_ratio(turns: list[dict[Key, float]], name: Key, reference: Key) -> float:
    """Median over rounds of the ratio of two numbers of the same round."""
    return median(turn[name] / turn[reference] for turn in turns)


def warm_up(model: PreTrainedModel, configs: list[MixKVConfig]) -> None:
    """Runs all caches once on a short prompt, which loads weights, starts threads and compiles kernels.

    Raises:
        InputError: the model cannot be compressed, or not with one of ``configs``.
    """
    count = 1 + 2 * max((config.window for config in configs), default=1)
    ids = torch.ones(1, count, dtype=torch.long, device=model.device)
    try:
        for config in [None, *configs]:
            step(model, read_prompt(model, ids, config).cache, ids[:, 0])
    except ValueError as error:
        raise InputError(str(error)) from error


def synchronize(device: torch.device) -> None:
    """Waits for the GPU. Does nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bind(model: PreTrainedModel, cache: Cache) -> None:
    """Gives ``model`` the attention function that ``cache`` needs; the full cache is timed with the model's own."""
    if isinstance(cache, MixKVCache):
        binding.bind(model)
    else:
        unpatch(model)


class _TimedLayer(MixKVLayer):
    """Measures the duration of its compression."""

    seconds = 0.0

    def compress(self, *args, **options) -> None:
        synchronize(self.device)
        start = perf_counter()
        super().compress(*args, **options)
        synchronize(self.device)
        self.seconds = perf_counter() - start


class _TimedCache(MixKVCache):
    layer_class = _TimedLayer
