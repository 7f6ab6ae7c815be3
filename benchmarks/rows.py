"""Row formats at equal bytes: divergence from the full cache, and answers kept, with the bytes of 64, 128 and 256 rows in bfloat16.

    python benchmarks/rows.py --task codes,prose,several,lookup,needle --samples 12 --first-seed 1 --out results.jsonl
    python benchmarks/rows.py --task form-later,receipt-later,screen-later --of 64 --samples 12 --first-seed 1
    python benchmarks/rows.py --read results.jsonl

Seeds are two apart, so that an even and an odd first seed have no text in common. The model computes in float32, and its rows stand
for those of a model in bfloat16: they differ by less than the formats. Bytes are those of keys, values, scales and positions, of all
entries, the window included.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from mixkv import MixKVConfig, registry
from mixkv.evaluation import evaluate, loading, pages, paired, tasks
from mixkv.selection.budget import POSITION_BYTES

BFLOAT16 = 2


def configs(given: argparse.Namespace, model) -> list[MixKVConfig]:
    """A config for every format and every number of bytes."""
    text = model.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = text.num_hidden_layers * text.num_key_value_heads
    rows = partial(MixKVConfig, method=given.method, score=given.score, window=given.window)
    size_of_row = 2 * size * BFLOAT16 + POSITION_BYTES
    return [
        rows(budget=count if name == "full" else f"{count * size_of_row * heads}B", rows=name)
        for name in registry.FORMATS
        for count in given.of
    ]


def samples(given: argparse.Namespace, loaded) -> list:
    seeds = range(given.first_seed, given.first_seed + 2 * given.samples, 2)
    return [
        ((task, given.tokens, seed), partial(tasks.TASKS[task], loaded.tokenizer, given.tokens, seed))
        if task in tasks.TASKS
        else ((task, 0, seed), partial(pages.TASKS[task], loaded, seed, variant="fresh", keys=[2, 3, 4]))
        for seed in seeds
        for task in given.task
    ]


def report(records: list[dict], formats: int) -> None:
    """A table row per task and number of bytes: KL of rows in the model's dtype, and of each format relative to it."""
    names = list(registry.FORMATS)
    print(
        "| task | samples | rows in bfloat16 | " + " | ".join(names) + " | answers kept |\n" + "|---" * (len(names) + 4) + "|"
    )
    for task in dict.fromkeys(record["task"] for record in records):
        mine = [record for record in records if record["task"] == task]
        for group, count in enumerate(mine[0]["of"]):
            results = [record["results"][group :: len(record["of"])] for record in mine]
            kl = [[result[index]["kl"] for result in results] for index in range(formats)]
            cells = [f"{sum(kl[0]) / len(mine):.3f}"]
            for values in kl[1:]:
                mean, low, high = paired.relative_change(values, kl[0])
                cells.append(f"{1 + mean:.2f} [{1 + low:.2f}, {1 + high:.2f}]")
            kept = [sum(result[index]["kept"] for result in results) for index in range(formats)]
            answered = None if mine[0]["answered"] is None else sum(record["answered"] for record in mine)
            cells.append("" if answered is None else ", ".join(map(str, kept)) + f" of {answered}")
            print(f"| {task} | {len(mine)} | {count} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=lambda text: text.split(","), default=list(tasks.TASKS))
    parser.add_argument("--of", type=lambda text: [int(part) for part in text.split(",")], default=[64, 128, 256])
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--method", default="global")
    parser.add_argument("--score", default="mix-output")
    parser.add_argument("--model", help="Hugging Face id or folder (default SmolLM2, or the document model for pages)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append each sample to this file")
    parser.add_argument("--read", type=Path, help="print the samples of this file")
    given = parser.parse_args()
    if given.read:
        records = [json.loads(line) for line in given.read.read_text().splitlines()]
        return report(records, len(registry.FORMATS))
    torch.set_num_threads(given.threads)
    vision = any(task in pages.TASKS for task in given.task)
    loaded = loading.load(given.model, dtype="float32", device="cpu", vision=vision)
    found = []
    for record in evaluate.run(loaded.model, loaded.tokenizer, samples(given, loaded), configs(given, loaded.model)):
        found.append(record | {"of": given.of})
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    report(found, len(registry.FORMATS))


if __name__ == "__main__":
    main()
