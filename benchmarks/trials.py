"""The tables of research/trials.md: variants that were tried on the way, from the samples in benchmarks/results/trials.jsonl.

    python benchmarks/trials.py benchmarks/results/trials.jsonl

One line a sample: trial, model, task, seed, and kl: variant to budget to nats a token. Of a trial the first variant is what the others
are compared with, sample by sample, at equal rows.
"""

from __future__ import annotations

import argparse
import json
from math import exp, log
from pathlib import Path

import torch
from quality import with_interval

from mixkv.evaluation import paired


def over_tasks(pairs: list[torch.Tensor]) -> tuple[float, float, float]:
    """Geometric mean over tasks of relative KL, less 1, and its 95 % interval; of each task [2, samples], variant and reference.

    Samples are drawn with replacement within their task, both numbers together.
    """
    found, drawn = 0.0, 0.0
    for seed, pair in enumerate(pairs):
        draws = pair[:, paired.draws(pair.shape[1], seed)].mean(dim=-1)
        drawn = drawn + (draws[0] / draws[1]).log()
        found += log(pair[0].mean() / pair[1].mean())
    count = len(pairs)
    return exp(found / count) - 1, *paired.interval((drawn / count).exp() - 1)


def print_table(lines: list[dict], budget: str) -> None:
    """Every variant against the first at one budget."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    reference, *others = lines[0]["kl"]
    of = {task: [line["kl"] for line in lines if line["task"] == task] for task in tasks}
    samples = {len(found) for found in of.values()}
    trial, model = lines[0]["trial"], lines[0]["model"]
    print(f"\n{trial}: {model}, budget {budget}, {' to '.join(map(str, sorted(samples)))} samples a task\n")
    print("| | " + " | ".join(["all", *tasks]) + " |\n" + "|---" * (len(tasks) + 2) + "|")
    means = [sum(kl[reference][budget] for kl in of[task]) / len(of[task]) for task in tasks]
    print(f"| {reference}: KL | | " + " | ".join(f"{value:.4f}" for value in means) + " |")
    for name in others:
        pairs = [torch.tensor([[kl[part][budget] for kl in of[task]] for part in (name, reference)]) for task in tasks]
        pairs = [pair.double() for pair in pairs]
        each = [paired.relative_change(*pair.tolist()) for pair in pairs]
        print(f"| {name} | " + " | ".join(with_interval(*found) for found in (over_tasks(pairs), *each)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    lines = [json.loads(line) for line in parser.parse_args().file.read_text().splitlines()]
    for trial, model in dict.fromkeys((line["trial"], line["model"]) for line in lines):
        mine = [line for line in lines if (line["trial"], line["model"]) == (trial, model)]
        for budget in next(iter(mine[0]["kl"].values())):
            print_table(mine, budget)


if __name__ == "__main__":
    main()
