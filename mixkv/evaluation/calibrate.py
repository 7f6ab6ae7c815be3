"""SparseMM's head scores (arXiv 2506.05344): which query heads look at what is being read off a page, or out of a text.

A head scores at an answer token when the key it attends to most, of the whole prompt, shows the very characters that the token
spells: 1 / (columns of the image, or of the text, that show them). Tokens count that the model itself gets right, fed the answer up
to there. A page's scores are summed, and averaged over pages.
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

# Names a page: kind, tokens (of a text; else 0), seed; as samples are named in `journal`.
Name = tuple[str, int, int]


def shape(loaded: Loaded) -> tuple[int, int]:
    """Layers that attend to everything, and query heads in each.

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
    """Reads page by page, or text by text: `boxes.align`, `spans.align`.

    Yields: a dict each page, with task (its kind), tokens, seed; prompt_tokens; boxed: answer tokens that stand on it; right:
        those that the model gets right; scores: ``"layer-head"`` to the sum over these, heads that never scored left out.

    Raises:
        InputError: a page that the model cannot read.
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
    """How many targets the model gets right, and every head's score over those: float64 [L, Hq]."""
    targets = aligned.targets
    if not targets:
        return 0, torch.zeros(shape(loaded), dtype=torch.float64)
    # A token is said by the column before it.
    logits, most = most_attended(loaded.model, aligned.inputs, [target.column - 1 for target in targets])
    right = logits.argmax(-1).cpu() == torch.tensor([target.token for target in targets])
    share = torch.zeros(len(targets), aligned.inputs["input_ids"].shape[1], dtype=torch.float64)
    for row, target in enumerate(targets):
        share[row, list(target.shown)] = 1 / len(target.shown)
    share[~right] = 0
    return int(right.sum()), share[torch.arange(len(targets)), most].sum(-1)


def profile(loaded: Loaded, records: list[dict[str, Any]]) -> Profile:
    """The mean over pages, in the order of ``records``.

    Raises:
        InputError: no token was right, or no head ever looked at what was read.
    """
    boxed, right = (sum(record[name] for record in records) for name in ("boxed", "right"))
    if right == 0:
        raise InputError(
            f"{loaded.name} gets none of the {boxed} answer tokens on {len(records)} pages right, and heads are judged where it "
            f"does: take a model that can read the pages, or another --kind"
        )
    layers, heads = shape(loaded)
    total = torch.zeros(layers, heads, dtype=torch.float64)
    for record in records:
        for name, score in record["scores"].items():
            layer, head = map(int, name.split("-"))
            total[layer, head] += score
    if not total.any():
        raise InputError(
            f"no head of {loaded.name} looked at one of the {right} tokens it got right: read more pages (--pages)"
        )
    return Profile(map(tuple, (total / len(records)).tolist()), loaded.model.config.model_type)
