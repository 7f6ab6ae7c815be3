"""Measuring one model with several caches: prefill, single decode steps in turn, agreement with the full cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache

from ..cache import MixKVCache


def prefill(model, ids: torch.Tensor, cache) -> tuple[torch.Tensor, float]:
    """Reads a prompt [B, N] into ``cache``: the last logits [B, V] in float32, and seconds."""
    _synchronise(model)
    start = time.perf_counter()
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    _synchronise(model)
    return logits[:, -1].float(), time.perf_counter() - start


def greedy(model, logits: torch.Tensor, cache, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Continues greedily from the prompt's last logits [1, V]: tokens [T], T <= steps, up to an end token, and their logits [T, V]."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    tokens, rows = [], []
    while True:
        rows.append(logits[0])
        tokens.append(int(logits[0].argmax()))
        if len(tokens) == steps or tokens[-1] in ends:
            return torch.tensor(tokens), torch.stack(rows)
        step = torch.tensor([[tokens[-1]]], device=logits.device)
        logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1].float()


def forced(model, cache, tokens: torch.Tensor) -> torch.Tensor:
    """Feeds given tokens [T] after a prompt: logits [T - 1, V] for the tokens after the first. The first one's come from the
    prompt itself, which is read uncompressed."""
    if len(tokens) < 2:
        return torch.empty(0, model.config.get_text_config(decoder=True).vocab_size)
    ids = tokens[None, :-1].to(model.device)
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].float()


def divergence(full: torch.Tensor, other: torch.Tensor) -> float | None:
    """Mean KL divergence (nats) from the full cache's next-token distributions to another's: logits [T, V] each."""
    if not len(full):
        return None
    p, q = full.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def same_first(tokens: torch.Tensor, other: torch.Tensor) -> int:
    """How many tokens agree before the first that does not."""
    count = min(len(tokens), len(other))
    unequal = (tokens[:count] != other[:count]).nonzero()
    return int(unequal[0]) if len(unequal) else count


def steps_in_turn(
    model, caches: dict[str, object], batch: dict[str, int], rounds: int, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of single decode steps, one of every cache a round, so that a busy machine slows all alike."""
    token = {name: torch.full((rows, 1), 5, device=model.device) for name, rows in batch.items()}
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for index in range(rounds + 2):
        for name, cache in caches.items():
            _synchronise(model)
            start = time.perf_counter()
            model(input_ids=token[name], past_key_values=cache, use_cache=True)
            _synchronise(model)
            if index >= 2:
                seconds[name].append(time.perf_counter() - start)
        tick()
    return seconds


def ratio(seconds: list[float], base: list[float]) -> float:
    """Median of round-by-round ratios."""
    return statistics.median(mine / other for mine, other in zip(seconds, base))


def held_bytes(cache) -> int:
    """Bytes of keys and values a cache of either kind holds."""
    if isinstance(cache, MixKVCache):
        return cache.stats()["bytes"]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def full_cache(model) -> DynamicCache:
    return DynamicCache(config=model.config)


def _synchronise(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
