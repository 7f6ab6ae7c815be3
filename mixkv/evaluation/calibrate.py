"""Head scores of SparseMM (arXiv 2506.05344): which query heads attend to the part of a page, or text, that shows the answer.

At each answer token, a head scores if the key that it attends to most, in the whole prompt, belongs to a token that shows the
characters of the answer token. The score is 1 / (number of tokens that show them). Only answer tokens count that the model itself
predicts correctly, given the answer so far. Scores are summed over a page and averaged over pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..head_profile import Profile
from ..hf import binding
from . import InputError
from .boxes import Aligned
from .loaded import Loaded
from .measure import no_progress
from .prompts import check_length
from .watch import most_attended

# Identifies a page: kind, length of a text in tokens (0 for a page), seed; as samples are identified in `journal`.
Name = tuple[str, int, int]


def shape(loaded: Loaded) -> tuple[int, int]:
    """The number of full-attention layers, and of query heads in each.

    Raises:
        InputError: the model cannot be compressed.
    """
    try:
        layers = binding.bind(loaded.model).count(None)
    except ValueError as error:
        raise InputError(str(error)) from error
    return layers, loaded.model.config.get_text_config(decoder=True).num_attention_heads


def run(
    loaded: Loaded, pages: Iterable[tuple[Name, Callable[[], Aligned]]], *, progress=no_progress
) -> Iterator[dict[str, Any]]:
    """Measures page by page, or text by text.

    Args:
        pages: the identity of each, and the function that makes it with `boxes.align` or `spans.align`.

    Yields: a dict per page, with task (its kind), tokens, seed; prompt_tokens; boxed: the number of answer tokens that it shows;
        right: the number of those that the model predicts correctly; scores: ``"layer-head"`` to the sum of its scores, without
        heads that never scored.

    Raises:
        InputError: the model cannot read a page.
    """
    pages = list(pages)
    for (kind, tokens, seed), make in pages:
        progress(f"{kind}, page {seed}", len(pages))
        aligned = make()
        check_length(loaded.model, aligned.inputs["input_ids"].shape[1], 0)
        right, found = scores(loaded, aligned)
        heads = found.nonzero().tolist()
        yield {
            "task": kind,
            "tokens": tokens,
            "seed": seed,
            "prompt_tokens": aligned.inputs["input_ids"].shape[1],
            "boxed": len(aligned.targets),
            "right": right,
            "scores": {f"{layer}-{head}": float(found[layer, head]) for layer, head in heads},
        }


def scores(loaded: Loaded, aligned: Aligned) -> tuple[int, torch.Tensor]:
    """The number of targets that the model predicts correctly, and the sum of every head's scores: float64 [L, Hq]."""
    targets = aligned.targets
    if not targets:
        return 0, torch.zeros(shape(loaded), dtype=torch.float64)
    # A token is predicted at the position before it.
    logits, most = most_attended(loaded.model, aligned.inputs, [target.position - 1 for target in targets])
    right = logits.argmax(-1).cpu() == torch.tensor([target.token for target in targets])
    share = torch.zeros(len(targets), aligned.inputs["input_ids"].shape[1], dtype=torch.float64)
    for row, target in enumerate(targets):
        share[row, list(target.shown)] = 1 / len(target.shown)
    share[~right] = 0
    return int(right.sum()), share[torch.arange(len(targets)), most].sum(-1)


def profile(loaded: Loaded, records: list[dict[str, Any]]) -> Profile:
    """The mean of the scores over pages, summed in the order of ``records``.

    Raises:
        InputError: no token was predicted correctly, or no head has a score.
    """
    boxed, right = (sum(record[name] for record in records) for name in ("boxed", "right"))
    if right == 0:
        raise InputError(
            f"{loaded.name} gets none of the {boxed} answer tokens on {len(records)} pages right, and heads are scored only at "
            f"correct tokens: use a model that can read the pages, or another --kind"
        )
    layers, heads = shape(loaded)
    total = torch.zeros(layers, heads, dtype=torch.float64)
    for record in records:
        for name, score in record["scores"].items():
            layer, head = map(int, name.split("-"))
            total[layer, head] += score
    if not total.any():
        raise InputError(
            f"no head of {loaded.name} attended to what it read at any of the {right} correct tokens: use more pages (--pages)"
        )
    return Profile(map(tuple, (total / len(records)).tolist()), loaded.model.config.model_type)
