"""Texts with the characters in which an answer stands, and which tokens of a prompt those are."""

from __future__ import annotations

import re

import torch

from .boxes import Aligned, Target, with_offsets
from .loaded import Loaded
from .tasks import TASKS

# Tasks whose answers stand in the text, word by word.
KINDS = ("codes", "lookup", "several")


def align(loaded: Loaded, kind: str, tokens: int, seed: int) -> Aligned:
    """A text of a kind in `KINDS`, a question about it and the answer, as ``loaded`` reads them in one.

    The question ends as the text itself puts the fact: what follows there is what an answer token spells.

    Raises:
        InputError: the tokenizer does not tell which characters its tokens spell.
    """
    sample = TASKS[kind](loaded.tokenizer, tokens, seed)
    asked = seed % len(sample.follow)
    answer = sample.expected[asked]
    prompt = loaded.tokenizer.decode(sample.context + sample.follow[asked], skip_special_tokens=True)
    said = f"{prompt} {answer}"
    read = with_offsets(loaded.tokenizer, said)
    fact = re.split(r"[?\n]", prompt)[-1].strip()
    stands, first = said.index(f"{fact} {answer}") + len(fact) + 1, len(prompt) + 1
    spans = read["offset_mapping"]
    targets = []
    for column, (low, high) in enumerate(spans):
        low = stands + max(low - first, 0)
        high = stands + high - first
        shown = [
            other for other, (start, end) in enumerate(spans[:column]) if start < high and low < end and end <= len(prompt)
        ]
        if shown and low < high:
            targets.append(Target(column, read["input_ids"][column], tuple(shown)))
    return Aligned({"input_ids": torch.tensor([read["input_ids"]])}, targets)
