"""Quality: compressed caches against the full cache, sample by sample, on tasks of `tasks` or from a file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import registry
from ..cache import MixKVCache
from ..cache.layer import MixKVLayer
from ..config import MixKVConfig
from . import InputError
from .measure import held, kl_divergence, no_progress, warm_up
from .prompts import check_length
from .recording import Recording, joined
from .tasks import Sample

# Identifies a sample: task, tokens, seed.
Name = tuple[str, int, int]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[tuple[Name, Callable[[], Sample]]],
    configs: list[MixKVConfig],
    *,
    answer_tokens: int = 16,
    progress=no_progress,
) -> Iterator[dict[str, Any]]:
    """Evaluates sample by sample: the model reads the context once, and every config compresses it.

    All caches are fed the same tokens, the question and then the reference: the true continuation if the task has one, else
    the greedy answer of the full cache, of at most ``answer_tokens``. So all results are paired, and the first token of an
    answer is predicted from the compressed cache too.

    Yields: a dict per sample, with task, tokens, seed, depth (or None); context_tokens; answered: the number of questions that
        the full cache answers correctly (None if the task has no correct answers); and under ``results`` a dict per config, in
        order: kl (KL divergence from the full cache's distributions, in nats, mean over tokens and questions), top1 (share of
        tokens for which the most likely token is the full cache's), kept (of the questions that the full cache answers
        correctly, the number that this cache answers correctly; for samples with a true answer, the number of questions that
        this cache answers exactly), rows_per_head (KV entries), resident (bytes of resident KV entries and of chunk bounds, as a
        share of the full cache's).

    Raises:
        InputError: a budget is not below the length of a context, a context exceeds the model's, or a profile is of another
            model.
    """
    samples = list(samples)
    profiled = [config for config in configs if registry.method(config.method).needs_profile]
    if profiled:
        # Reports a profile of another model before the first sample is read.
        warm_up(model, profiled[:1])
    for (task, tokens, seed), make in samples:
        progress(f"{task}, {tokens} tokens, sample {seed}", len(samples))
        sample = make()
        check_length(model, len(sample.context), max(map(len, sample.follow)) + answer_tokens)
        _check_budgets(configs, len(sample.context), task)
        window = max(config.window for config in configs)
        inputs = {name: value.to(model.device) for name, value in sample.inputs.items()}
        context = torch.tensor([sample.context], device=model.device)
        replayed = [config.replay_chunk for config in configs if registry.score(config.score).needs_replay]
        recording = Recording(model, context, window=window, inputs=inputs, replay_chunk=max(replayed, default=None))
        questions = [_question(recording, tokenizer, sample, index, answer_tokens) for index in range(len(sample.follow))]
        results = list(_results(recording, configs, questions))
        answered = None if sample.expected is None else sum(question.answered(question.said) for question in questions)
        yield {
            "task": task,
            "tokens": tokens,
            "seed": seed,
            "depth": sample.depth,
            "context_tokens": len(sample.context),
            "answered": answered,
            "results": results,
        }


@dataclass(frozen=True)
class _Question:
    """A question, its reference answer, and the full cache's prediction of it.

    Attributes:
        fed: the tokens that are fed after the context [1, n]: the question, and the answer without its last token.
        answer: the tokens of the reference answer [T].
        reference: logits of the full cache for each of them [T, V], in float32.
        right: the number of leading tokens of the full cache's own answer that contain the correct answer; None if it is wrong
            or the task has no correct answers.
        truth: whether ``answer`` is the complete correct answer, which a cache must give exactly.
    """

    fed: torch.Tensor
    answer: torch.Tensor
    reference: torch.Tensor
    right: int | None
    truth: bool

    @cached_property
    def said(self) -> torch.Tensor:
        """The most likely tokens according to the full cache [T]."""
        return self.reference.argmax(-1)

    def answered(self, said: torch.Tensor) -> bool:
        """Whether a cache whose most likely tokens are ``said`` [T] gives the correct answer."""
        if self.truth:
            return bool((said == self.answer).all())
        return self.right is not None and bool((said == self.said)[: self.right].all())


def _question(recording: Recording, tokenizer, sample: Sample, index: int, answer_tokens: int) -> _Question:
    follow = torch.tensor([sample.follow[index]], device=recording.logits.device)
    if sample.answer is None:
        answer = recording.answer(follow, answer_tokens)
    else:
        answer = torch.tensor([sample.answer[index]], device=follow.device)
    fed = torch.cat([follow, answer[:, :-1]], dim=1)
    logits = recording.follow(recording.compressed(None), fed, last=answer.shape[1])[0].float()
    right, truth = None, sample.expected is not None and sample.answer is not None
    if sample.expected is not None:
        texts = (tokenizer.decode(answer[0, : count + 1]) for count in range(answer.shape[1]))
        right = next((count + 1 for count, text in enumerate(texts) if sample.expected[index] in text), None)
    return _Question(fed, answer[0], logits, right, truth)


def _results(
    recording: Recording, configs: list[MixKVConfig], questions: list[_Question], together: int = 16
) -> Iterator[dict[str, Any]]:
    """One dict per config. Up to ``together`` caches that store entries alike are evaluated as one batch."""
    for _, alike in groupby(configs, key=lambda config: (_chunk(config), config.rows)):
        while group := list(islice(alike, together)):
            caches = [recording.compressed(config) for config in group]
            sizes = [(held(cache).rows_per_head, _resident(cache)) for cache in caches]
            batch = caches[0] if len(caches) == 1 else joined(caches)
            outcomes = [_outcome(recording, batch, len(caches), question) for question in questions]
            for index, (rows, resident) in enumerate(sizes):
                mine = [outcome[index] for outcome in outcomes]
                yield {
                    "kl": round(mean(kl for kl, _, _ in mine), 6),
                    "top1": round(mean(top1 for _, top1, _ in mine), 4),
                    "kept": sum(kept for _, _, kept in mine),
                    "rows_per_head": round(rows, 2),
                    "resident": round(resident, 5),
                }


def _chunk(config: MixKVConfig) -> int | None:
    """The number of tokens of a chunk; None if the cache has no chunks."""
    return config.hybrid_chunk if registry.method(config.method).keeps_chunks else None


def _resident(cache: MixKVCache) -> float:
    """The bytes of resident KV entries, with scales, and of chunk bounds, as a share of the full cache's in the same layers."""
    layers = [layer for layer in cache.layers if isinstance(layer, MixKVLayer)]
    rows = sum(layer.row_bytes for layer in layers)
    bounds = sum(layer.chunks.bound_bytes for layer in layers if layer.chunks is not None)
    return (rows + bounds) / sum(layer.nbytes_full for layer in layers)


def _outcome(recording: Recording, batch: MixKVCache, count: int, question: _Question) -> list[tuple[float, float, bool]]:
    """Divergence, agreement, and whether the answer is correct, for each of ``count`` caches of a batch."""
    reference = question.reference
    fed = question.fed.expand(count, -1)
    found = []
    for logits in recording.follow(copy.deepcopy(batch), fed, last=reference.shape[0]).float():
        said = logits.argmax(-1)
        agreement = (said == question.said).float().mean()
        found.append((float(kl_divergence(reference, logits).mean()), float(agreement), question.answered(said)))
    return found


def _check_budgets(configs: list[MixKVConfig], length: int, task: str) -> None:
    for config in configs:
        if isinstance(config.budget, int) and config.budget >= length:
            raise InputError(
                f"--budget {config.budget} is not below the length of the context of task {task} ({length} tokens), so nothing "
                f"would be compressed: use a smaller budget or longer contexts (--tokens)"
            )
