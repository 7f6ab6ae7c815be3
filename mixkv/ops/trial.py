"""A back end on trial: ``python -m mixkv.ops.trial`` checks and times one, in a process that nobody else needs.

`mixkv.ops.checked` starts it and reads its output, a JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import torch

from . import dispatch
from .arguments import LogitOptions, RaggedBuffers
from .check_stores import Stores, copied
from .self_check import LOSS_FLOOR, SIZES, Checks

# Decode steps that are timed: batch rows, KV heads, query heads a KV head, rows of the shortest and of the longest sequence.
TIMED = ((1, 8, 4, 32, 400), (8, 8, 4, 1024, 4096))
_STEPS, _RUNS = 16, 7


class Timing:
    """Decode steps of one layer, append and attention, each of which is given other numbers and is checked afterwards."""

    def __init__(
        self, backend: str, device: torch.device, dtype: torch.dtype, size: int, value_size: int, cases=None, seed: int = 2
    ):
        self.backend, self.device, self.logits = backend, device, LogitOptions(size**-0.5)
        torch.manual_seed(seed)
        chance = random.Random(seed)
        stores = Stores(device, chance, poisoned=False)
        self.cases = []
        for batch, heads, groups, shortest, longest in cases or TIMED:
            lengths = [chance.randint(shortest, longest) for _ in range(batch * heads)]
            store = stores.make(size, value_size, lengths, dtype, spare=_STEPS + 1)
            steps = [
                tuple(torch.randn(batch, count, 1, width, device=device).to(dtype) for count, width in parts)
                for parts in [((heads * groups, size), (heads, size), (heads, value_size))] * _STEPS
            ]
            self.cases.append((store, steps, max(lengths)))

    def decode(self, store: RaggedBuffers, steps: list, longest: int, backend: str) -> list[torch.Tensor]:
        return [
            dispatch.append_attend(
                backend, *(query, store, key, value), index, self.logits, max_length=longest + index + 1, stride=None
            )
            for index, (query, key, value) in enumerate(steps)
        ]

    @torch.inference_mode()
    def seconds(self) -> tuple[float, list[str]]:
        """Median seconds of a step of every case, added up, and what was wrong with the results of the steps that were timed."""
        total, wrong = 0.0, []
        for number, (store, steps, longest) in enumerate(self.cases):
            times = []
            for _ in range(_RUNS + 2):
                mine = copied(store)
                self.wait()
                began = time.perf_counter()
                outputs = self.decode(mine, steps, longest, self.backend)
                self.wait()
                times.append((time.perf_counter() - began) / len(steps))
            total += statistics.median(times[2:])
            wanted = self.decode(copied(store), steps, longest, "torch")
            bound = 10 * LOSS_FLOOR[outputs[0].dtype]
            close = all(((one - other).norm() <= bound * other.norm()).item() for one, other in zip(outputs, wanted))
            if not close:
                wrong.append(f"the steps that were timed gave other results than plain torch (case {number})")
        return total, wrong

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def say(event: str, **what: Any) -> None:
    """A line for the process that reads this one's output."""
    print(json.dumps({"event": event, **what}), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mixkv.ops.trial", description="Checks and times one back end.")
    parser.add_argument("backend")
    parser.add_argument("device")
    parser.add_argument("dtype")
    parser.add_argument("key_size", type=int)
    parser.add_argument("value_size", type=int)
    given = parser.parse_args(arguments)
    device, dtype, size = torch.device(given.device), getattr(torch, given.dtype), (given.key_size, given.value_size)
    # What fails before this line is no fault of the back end.
    torch.zeros(1, device=device).sum().item()
    say("started")
    reason = dispatch.why_not(given.backend, device, dtype, *size)
    if reason is not None:
        say("unavailable", reason=reason)
        return
    checks = Checks(given.backend, device)
    # Plain torch is what the others are compared with.
    if given.backend != "torch":
        checks.run(dict.fromkeys((dtype, torch.float32)), dict.fromkeys((*SIZES, size)))
    say("checked", count=checks.count, failures=checks.failures[:20], worst=checks.worst)
    if checks.failures:
        return
    timing = Timing(given.backend, device, dtype, *size)
    say("timing")
    began = time.perf_counter()
    seconds, wrong = timing.seconds()
    # Of half of the runs it is known that they took no less than the median.
    steps = _STEPS * (_RUNS + 1) // 2
    say("timed", seconds=seconds, steps=steps, elapsed=time.perf_counter() - began, failures=wrong)


if __name__ == "__main__":
    main()
