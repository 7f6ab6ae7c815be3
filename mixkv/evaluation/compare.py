"""Full and compressed caches on one prompt: their size, their speed, and how far their answers agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import mean, median
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ..config import MixKVConfig
from . import InputError, measure, paired
from .measure import Held, Progress, Read, median_ratio, no_progress
from .prompts import check_length

FULL = "full"

# Index to config; index 0 is the full cache.
Plan = dict[int, MixKVConfig | None]


def grid(kinds: list[tuple[str, str]], budgets: list[int | float | str], **options: Any) -> list[MixKVConfig]:
    """A config for every (method, score) of ``kinds`` and every budget; ``options`` are further fields of all of them.

    Raises:
        InputError: a value is invalid; the message names it.
    """
    try:
        return [
            MixKVConfig(method=method, score=score, budget=budget, **options) for budget in budgets for method, score in kinds
        ]
    except ValueError as error:
        raise InputError(str(error)) from error


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    configs: list[MixKVConfig],
    *,
    inputs: Mapping[str, torch.Tensor] = MappingProxyType({}),
    max_new_tokens: int = 48,
    repeats: int = 2,
    steps: int = 40,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Compares compressed caches with the full cache on one prompt [1, N].

    Each cache is prefilled ``repeats`` times and decodes at least ``steps`` tokens, interleaved with the others; ratios are
    medians of the ratios to the full cache in the same round. Agreement is measured on the greedy answer of the full cache:
    every cache is fed that answer token by token, and the distributions of its tokens from the second on are compared. (The
    first token is predicted in the prefill, which is not compressed.)

    Args:
        inputs: further inputs of the model, such as pixel_values.
        repeats: 2 or more.

    Returns: a list of dicts, the full cache's first, with
        method (``full`` for the full cache), score, budget;
        prompt_tokens;
        rows, rows_per_head, bytes: size right after the prompt, rows in KV entries; bytes_ratio: to the full cache;
        prefill_seconds, prefill_ratio, step_seconds, step_ratio;
        answer, answer_tokens: the cache's own greedy answer, and its number of tokens;
        equal_tokens: the number of leading tokens equal to the full cache's answer, which has reference_tokens;
        mean_kl: mean KL divergence from the full cache's distributions, in nats per token; None for an answer of one token.

    Raises:
        InputError: the prompt and its answer exceed the model's context, or the model cannot be compressed.
    """
    if repeats < 2:
        raise InputError(
            f"--repeats {repeats} is too few: the first prefill is for the answers and the last one for the steps; use 2 or more"
        )
    check_length(model, input_ids.shape[1], max(max_new_tokens, steps))
    plan: Plan = dict(enumerate([None, *configs]))
    work = len(plan) * repeats + max(steps, max_new_tokens)
    input_ids = input_ids.to(model.device)
    read = partial(
        measure.read_prompt, model, input_ids, inputs={name: value.to(model.device) for name, value in inputs.items()}
    )
    measure.warm_up(model, configs)

    held, answers, first = _answers(model, read, plan, max_new_tokens, progress, work)
    turns = [first]
    for _ in range(repeats - 1):
        caches, seconds = _read(read, plan, progress, work)
        turns.append(seconds)
    step_turns, divergences = _steps(model, caches, answers[0], steps, progress, work)
    return [
        {
            "method": FULL if config is None else config.method,
            "score": None if config is None else config.score,
            "budget": None if config is None else config.budget,
            "prompt_tokens": input_ids.shape[1],
            "rows": held[index].rows,
            "rows_per_head": held[index].rows_per_head,
            "bytes": held[index].bytes,
            "bytes_ratio": held[index].bytes / held[0].bytes,
            "prefill_seconds": median(turn[index] for turn in turns),
            "prefill_ratio": median_ratio(turns, index, 0),
            "step_seconds": median(turn[index] for turn in step_turns),
            "step_ratio": median_ratio(step_turns, index, 0),
            "answer": tokenizer.decode(answers[index], skip_special_tokens=True).strip(),
            "answer_tokens": len(answers[index]),
            "equal_tokens": measure.equal_prefix(answers[index], answers[0]),
            "reference_tokens": len(answers[0]),
            "mean_kl": mean(divergences[index]) if divergences[index] else None,
        }
        for index, config in plan.items()
    ]


def label(config: MixKVConfig | None) -> str:
    """A name for tables and pictures."""
    if config is None:
        return "full cache"
    return f"{config.method} {config.score} {config.budget}{paired.form(config.to_dict())}"


def _answers(
    model: PreTrainedModel, read: Callable[..., Read], plan: Plan, count: int, progress: Progress, work: int
) -> tuple[dict[int, Held], dict[int, list[int]], dict[int, float]]:
    """One round of prefills and answers: sizes, answers, and seconds of the prefills."""
    held, answers, seconds = {}, {}, {}
    for index, config in plan.items():
        progress(f"prefill and answer: {label(config)}", work)
        found = read(config)
        held[index], seconds[index] = measure.held(found.cache), found.seconds
        answers[index] = measure.greedy(model, found, count)
    return held, answers, seconds


def _read(read: Callable[..., Read], plan: Plan, progress: Progress, work: int) -> tuple[dict[int, Cache], dict[int, float]]:
    """One round of prefills: the caches, and the seconds."""
    caches, seconds = {}, {}
    for index, config in plan.items():
        progress(f"prefill: {label(config)}", work)
        found = read(config)
        caches[index], seconds[index] = found.cache, found.seconds
    return caches, seconds


def _steps(
    model: PreTrainedModel, caches: dict[int, Cache], answer: list[int], steps: int, progress: Progress, work: int
) -> tuple[list[dict[int, float]], dict[int, list[float]]]:
    """Feeds the answer to all caches, repeatedly until ``steps`` are done: seconds per round, and divergences per cache.

    Divergences are those of the answer's tokens after the first; the repetitions are only timed.
    """
    compared = len(answer) - 1
    fed = torch.tensor([[answer[turn % len(answer)]] for turn in range(max(steps, compared))], device=model.device)
    turns: list[dict[int, float]] = []
    divergences: dict[int, list[float]] = {index: [] for index in caches}
    for outcome in measure.rounds(model, caches, fed):
        progress("decoding", work)
        if len(turns) < compared:
            for index, (logits, _) in outcome.items():
                divergences[index].append(float(measure.kl_divergence(outcome[0][0], logits).mean()))
        turns.append({index: seconds for index, (_, seconds) in outcome.items()})
    return turns, divergences
