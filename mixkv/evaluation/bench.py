"""Time and memory, in one process: the full cache, every method, and the floor (the full cache of a short prompt)."""

from __future__ import annotations

from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ..cache import MixKVCache, MixKVLayer
from ..config import MixKVConfig
from ..ragged import RaggedStore
from ..selection import Selection
from . import InputError, measure
from .measure import Held, Progress, Read, median_ratio, no_progress
from .prompts import check_length, filler

FULL, FLOOR = "full", "floor"
PREFILL_LIMIT, STEP_LIMIT, LENGTH_LIMIT, BYTES_LIMIT = 1.05, 1.15, 1.05, 1.25

# What is measured: a method (or FULL, or FLOOR) and the prompt's length.
Name = tuple[str, int]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_tokens: list[int],
    budget: int = 128,
    methods: list[str],
    batch: int = 1,
    repeats: int = 3,
    steps: int = 48,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Measures prompts of each length under the full cache and every method (score ``mix``), and the floor.

    The floor is the uncompressed model after a prompt of ``budget`` tokens: what a decode step costs with so many rows and
    no compression. Prompts are read turn by turn, ``repeats`` times; then all caches of all lengths, each holding its prompt,
    decode one token each, turn by turn, ``steps`` times. Seconds are medians, ratios medians of the ratios within a turn.

    ``sparsemm`` gets a made-up profile: its time depends on how uneven the heads are, not on which they are.

    Returns: a dict for each of them, with
        method, prompt_tokens, batch;
        prefill_seconds; first_token_seconds (making the cache and reading the token included); step_seconds;
        bytes, rows_per_head: held right after the prompt; peak_bytes: on the GPU while reading it, None on the CPU;
        bytes_to_full, prefill_to_full, step_to_full: ratios to the full cache of the same prompt;
        step_to_floor; step_to_shortest: to the same method after the shortest prompt.

    Raises:
        InputError: a prompt that does not fit the model or the budget.
    """
    lengths = sorted(set(prompt_tokens))
    if lengths[0] <= budget:
        raise InputError(f"--prompt-tokens {lengths[0]} is within --budget {budget}, so nothing would be compressed: give longer prompts")
    check_length(model, lengths[-1], steps)
    plan = _plan(model, lengths, budget, methods)
    configs = [config for config in plan.values() if config is not None]
    measure.warm_up(model, configs[: len(methods)])
    work = len(plan) * repeats + steps

    turns: list[dict[Name, Read]] = []
    held: dict[Name, Held] = {}
    caches: dict[Name, Cache] = {}
    for _ in range(repeats):
        reads = {}
        for name, config in plan.items():
            progress(f"reading {name[1]} tokens: {name[0]}", work)
            ids = filler(tokenizer, name[1], batch).to(model.device)
            read = measure.read_prompt(model, ids, config)
            held[name], caches[name] = measure.held(read.cache), read.cache
            reads[name] = read.timing
        turns.append(reads)
    step_turns = []
    for outcome in measure.rounds(model, caches, filler(tokenizer, steps, batch).T.to(model.device)):
        progress("decoding, turn by turn", work)
        step_turns.append({name: seconds for name, (_, seconds) in outcome.items()})
    return [_record(name, batch, budget, lengths[0], turns, held, step_turns) for name in plan]
