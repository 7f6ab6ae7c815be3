"""Texts, and the tokens of a text that contain the characters of an answer."""

from __future__ import annotations

import re

import torch

from .boxes import Aligned, Target, with_offsets
from .loaded import Loaded
from .tasks import TASKS

# Tasks whose texts contain the words of the answer.
KINDS = ("codes", "lookup", "several")


def align(loaded: Loaded, kind: str, tokens: int, seed: int) -> Aligned:
    """A text of a kind in `KINDS`, a question about it and the answer, as one prompt of ``loaded``.

    The question ends in the words in which the text states the fact; what follows these words in the text is the answer.

    Raises:
        InputError: the tokenizer cannot map tokens to characters.
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
    for position, (low, high) in enumerate(spans):
        low = stands + max(low - first, 0)
        high = stands + high - first
        shown = [
            other for other, (start, end) in enumerate(spans[:position]) if start < high and low < end and end <= len(prompt)
        ]
        if shown and low < high:
            targets.append(Target(position, read["input_ids"][position], tuple(shown)))
    return Aligned({"input_ids": torch.tensor([read["input_ids"]])}, targets)
