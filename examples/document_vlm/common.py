"""What both halves of the training use."""

from __future__ import annotations

import math
import time

# What the stage "text" hands to the last one, and where the processes of that meet; gone at the end.
TEXT_PART, MEETING = "text.part", "meeting"


def single(tokenizer, text: str) -> int:
    """The one token that ``text`` is."""
    ids = tokenizer(text)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens: a cell must be one; take it out of mixkv/document/words.py")
    return ids[0]


def set_rate(optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def cosine(step: int, steps: int, warm: int, first: float = 1.0, final: float = 0.02) -> float:
    """Linear warm-up, then a cosine from ``first`` down to ``final``."""
    done = max(step - warm, 0) / max(steps - warm, 1)
    return min((step + 1) / warm * first, final + (first - final) * (1 + math.cos(math.pi * done)) / 2)


def log(text: str, started: float) -> None:
    print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)
