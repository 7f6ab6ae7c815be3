"""Time and memory, in one process: the full cache, compressed caches, and the floor (the full cache of a short prompt)."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import registry
from ..cache import MixKVCache
from ..cache.layer import MixKVLayer
from ..config import MixKVConfig
from ..selection.ranking import Selection
from ..storage.ragged import RaggedStore
from . import InputError, measure
from .measure import Progress, median_ratio, no_progress
from .prompts import check_length, filler

FULL, FLOOR = "full", "floor"

# Upper limits of `targets`.
BYTES, PREFILL, STEP, LONGER = 1.25, 1.03, 1.03, 1.05

# Identifies a measurement: a method, FULL or FLOOR, and the length of the prompt.
Name = tuple[str, int]
Turns = list[dict[Name, float]]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_tokens: list[int],
    methods: list[str],
    budget: int = 128,
    batches: tuple[int, ...] | list[int] = (1,),
    repeats: int = 3,
    steps: int = 48,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Measures the full cache and ``methods`` on prompts of each length, and the floor.

    The floor is the full cache of a prompt of ``budget`` tokens: a decode step over as many KV entries, without compression.
    Prefills are interleaved, ``repeats`` of each cache. Then all caches of all lengths decode one token each in turn, ``steps``
    times. Seconds are medians; ratios of seconds are medians over rounds. All of it is repeated for every batch size.

    Methods that need a head profile get a made-up one: their time depends on how uneven the heads are, not on which they are.

    Args:
        methods: names of methods, used with score ``mix``, or METHOD+SCORE such as ``global+mix-output``.
        batches: batch sizes, of copies of the prompt.

    Returns: a list of dicts, ordered by batch size, with
        method, prompt_tokens, batch;
        prefill_seconds; compress_seconds: the part of it that compression took; first_token_seconds: also creating the cache
        and reading the token back; step_seconds;
        bytes, rows_per_head: size right after the prompt, rows_per_head in KV entries; peak_bytes: peak memory during the first
        prefill minus the memory in use before it, None if the system does not report it;
        bytes_to_full, peak_to_full, prefill_to_full, step_to_full: ratios to the full cache of the same prompt, None for the
        floor and if unknown;
        prefill_to_rest: ratio of the prefill to the same prefill without compress_seconds. Other load affects both parts, so
        that it resolves differences of 1 %, which two separate prefills do not;
        step_to_floor; step_to_shortest: ratio to the same method after the shortest prompt.

    Raises:
        InputError: a prompt is not longer than the budget, or exceeds the model's context.
    """
    lengths = sorted(set(prompt_tokens))
    if lengths[0] <= budget:
        raise InputError(
            f"--prompt-tokens {lengths[0]} does not exceed --budget {budget}, so nothing would be compressed: use longer prompts"
        )
    check_length(model, lengths[-1], steps)
    plan = _plan(model, lengths, methods, budget)
    measure.warm_up(model, [config for config in plan.values() if config is not None])
    sizes = sorted(set(batches))
    work = len(sizes) * (len(plan) * repeats + steps)
    return [
        record
        for batch in sizes
        for record in _batch(model, tokenizer, plan, batch, repeats, steps, lambda what: progress(what, work))
    ]


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: dict[Name, MixKVConfig | None],
    batch: int,
    repeats: int,
    steps: int,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """`run` for one batch size."""
    caches: dict[Name, measure.Cache] = {}
    held: dict[Name, measure.Held] = {}
    peaks: dict[Name, int | None] = {}
    prefills: Turns = [{} for _ in range(repeats)]
    rests: Turns = [{} for _ in range(repeats)]
    firsts: Turns = [{} for _ in range(repeats)]
    for turn in range(repeats):
        for name, config in plan.items():
            progress(f"prefill of {batch} x {name[1]} tokens: {name[0]}")
            caches.pop(name, None)
            ids = filler(tokenizer, name[1], batch).to(model.device)
            read = measure.read_prompt(model, ids, config, watch_memory=turn == 0)
            prefills[turn][name], firsts[turn][name] = read.seconds, read.first_token_seconds
            rests[turn][name] = read.seconds - read.compress_seconds
            caches[name], held[name] = read.cache, measure.held(read.cache)
            if turn == 0:
                peaks[name] = read.peak_bytes
    decodes: Turns = []
    for outcome in measure.rounds(model, caches, filler(tokenizer, steps, batch).T.to(model.device)):
        progress("decoding")
        decodes.append({name: seconds for name, (_, seconds) in outcome.items()})

    records = []
    floor, shortest_length = next(iter(plan)), min(length for method, length in plan if method != FLOOR)
    for name in plan:
        full, shortest = (FULL, name[1]), (name[0], shortest_length)
        alone = name[0] == FLOOR
        records.append(
            {
                "method": name[0],
                "prompt_tokens": name[1],
                "batch": batch,
                "prefill_seconds": median(turn[name] for turn in prefills),
                "compress_seconds": median(whole[name] - rest[name] for whole, rest in zip(prefills, rests)),
                "first_token_seconds": median(turn[name] for turn in firsts),
                "step_seconds": median(turn[name] for turn in decodes),
                "bytes": held[name].bytes,
                "rows_per_head": held[name].rows_per_head,
                "peak_bytes": peaks[name],
                "bytes_to_full": None if alone else held[name].bytes / held[full].bytes,
                "peak_to_full": None if alone or not peaks[full] else peaks[name] / peaks[full],
                "prefill_to_full": None if alone else median_ratio(prefills, name, full),
                "prefill_to_rest": median(whole[name] / rest[name] for whole, rest in zip(prefills, rests)),
                "step_to_full": None if alone else median_ratio(decodes, name, full),
                "step_to_floor": median_ratio(decodes, name, floor),
                "step_to_shortest": None if alone else median_ratio(decodes, name, shortest),
            }
        )
    return records


def targets(records: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The measurements of `run` beside this library's targets. Methods that keep all entries in chunks have none.

    Returns: a list of dicts with ``what`` (the ratio), method, prompt_tokens, batch, value, limit (the target: at most this)
        and met.
    """
    found = []
    shortest = min(record["prompt_tokens"] for record in records if record["method"] != FLOOR)
    for record in records:
        if record["method"] in (FULL, FLOOR) or registry.method(record["method"].partition("+")[0]).keeps_chunks:
            continue
        limits = {
            "prefill_to_full": PREFILL,
            "prefill_to_rest": PREFILL,
            "step_to_floor": STEP,
            "bytes_to_full": BYTES * budget / record["prompt_tokens"],
        }
        if record["prompt_tokens"] != shortest:
            limits["step_to_shortest"] = LONGER
        for what, limit in limits.items():
            place = {key: record[key] for key in ("method", "prompt_tokens", "batch")}
            found.append({"what": what, **place, "value": record[what], "limit": limit, "met": record[what] <= limit})
    return found


def append_times(model: PreTrainedModel, stored: tuple[int, ...] = (128, 4096), appends: int = 1024) -> list[dict[str, Any]]:
    """Time of `RaggedStore.append` alone, one entry per head at a time, for stores of different sizes of one layer of ``model``.

    In place, there is always spare room: what was appended is removed again. Growing, the buffers are reallocated whenever
    they are full; the mean spreads that over all entries appended.

    Returns: a list of dicts with rows_per_head, in_place_seconds (median), growing_seconds (mean).
    """
    heads, size = _shape(model)
    row = torch.randn(1, heads, 1, size, dtype=model.dtype, device=model.device)
    stores = {rows: _store(heads, rows, row) for rows in stored}
    in_place: dict[int, list[float]] = {rows: [] for rows in stored}
    for _ in range(appends):
        for rows, store in stores.items():
            in_place[rows].append(_append(store, row))
            store.crop(1)
    growing = {rows: [_append(store, row) for _ in range(appends)] for rows, store in stores.items()}
    return [
        {"rows_per_head": rows, "in_place_seconds": median(in_place[rows]), "growing_seconds": mean(growing[rows])}
        for rows in stored
    ]


def _plan(model: PreTrainedModel, lengths: list[int], methods: list[str], budget: int) -> dict[Name, MixKVConfig | None]:
    plan: dict[Name, MixKVConfig | None] = {(FLOOR, budget): None}
    profile = None
    profiled = {name for name, method in registry.METHODS.items() if method.needs_profile}
    if any(name.partition("+")[0] in profiled for name in methods):
        heads, _ = _shape(model)
        layers = sum(isinstance(layer, MixKVLayer) for layer in MixKVCache(model).layers)
        profile = torch.rand(layers, heads, generator=torch.Generator().manual_seed(0)).pow(2).tolist()
    try:
        configs = {}
        for name in methods:
            method, _, score = name.partition("+")
            configs[name] = MixKVConfig(
                method=method, score=score or "mix", budget=budget, profile=profile if method in profiled else None
            )
    except ValueError as error:
        raise InputError(str(error)) from error
    for length in lengths:
        plan[FULL, length] = None
        plan.update({(method, length): config for method, config in configs.items()})
    return plan


def _shape(model: PreTrainedModel) -> tuple[int, int]:
    """The number of KV heads and the head size."""
    config = model.config.get_text_config(decoder=True)
    query_heads = config.num_attention_heads
    return (
        getattr(config, "num_key_value_heads", None) or query_heads,
        getattr(config, "head_dim", None) or config.hidden_size // query_heads,
    )


def _store(heads: int, rows: int, row: torch.Tensor) -> RaggedStore:
    """A store of ``heads`` sequences of ``rows`` copies of ``row`` [1, heads, 1, D]."""
    kept = torch.arange(rows, dtype=torch.int32, device=row.device).repeat(heads)
    lengths = torch.full((1, heads), rows, device=row.device)
    nothing = torch.zeros(1, heads, 0, device=row.device)
    states = row.expand(-1, -1, rows, -1)
    return RaggedStore.from_selection(states, states, Selection(kept, nothing, lengths, nothing, nothing))


def _append(store: RaggedStore, row: torch.Tensor) -> float:
    measure.synchronize(row.device)
    start = perf_counter()
    store.append(row, row, store.max_length)
    measure.synchronize(row.device)
    return perf_counter() - start
