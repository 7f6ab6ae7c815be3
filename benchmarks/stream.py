"""Pages read one after the other into one bounded cache, then questions about any of them: answers and bytes against pages read.

    python benchmarks/stream.py [--pages 48] [--page-tokens 128] [--each 40] [--all 512] [--seeds 1,3] [--out FILE.jsonl] [--figure FILE.svg]

A page is prose from Python's manual with one made-up fact in it. Nothing is asked while pages are read: `mixkv.read` repeats each page by
itself (``score="replay"``) and keeps ``--each`` entries of it per KV head (``turns="each"``), or ``--all`` of everything read so far
(``turns="all"``). After 1/4, 1/2, 3/4 and all of the pages, questions are asked about pages drawn from those read, each on a copy of the
cache. ``right``: the share of questions whose answer the model ranks first token by token; ``loss``: nats a token of the
answer.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from pathlib import Path

import torch
import transformers

import mixkv
from mixkv.cache.stats import held_bytes
from mixkv.evaluation import smollm2, tasks
from mixkv.hf.versions import cache_argument

QUESTIONS = 12
CHOICES = {"job": tasks._JOBS, "home town": tasks._TOWNS, "pet": tasks._PETS}


def make_pages(tokenizer, seed: int, count: int, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For every page its ids [1, n], and ids [1, m] of a question about it and of the answer."""
    chance = random.Random(f"stream {seed}")
    subjects = [(kind, name) for name in tasks._FIRST for kind in CHOICES]
    if count > len(subjects):
        raise SystemExit(f"--pages {count} must be at most {len(subjects)}, the number of different facts")
    pages = []
    for kind, name in chance.sample(subjects, count):
        value = f" {chance.choice(CHOICES[kind])}"
        fact = tokenizer(f". The {kind} of {name} is{value}.", add_special_tokens=False)["input_ids"]
        prose = tokenizer("\n\n" + tasks._passage(chance, seed, 8 * tokens), add_special_tokens=False)["input_ids"][
            : tokens - len(fact)
        ]
        cut = chance.randrange(1, len(prose))
        asked = tokenizer(f"\n\nWhat is the {kind} of {name}? The {kind} of {name} is", add_special_tokens=False)["input_ids"]
        answer = tokenizer(value, add_special_tokens=False)["input_ids"]
        pages.append(tuple(torch.tensor([ids]) for ids in ([*prose[:cut], *fact, *prose[cut:]], asked, answer)))
    return pages


@torch.no_grad()
def ask(model, cache, question: torch.Tensor, answer: torch.Tensor) -> tuple[bool, float]:
    """Whether the answer is what the model ranks first after the question, and its loss in nats a token."""
    logits = model(torch.cat([question, answer[:, :-1]], dim=1), **cache_argument(copy.deepcopy(cache))).logits
    logits = logits[0, -answer.shape[1] :].log_softmax(dim=-1)
    right = torch.equal(logits.argmax(dim=-1), answer[0])
    return right, -float(logits.gather(1, answer[0].unsqueeze(1)).mean())


@torch.no_grad()
def stream(model, tokenizer, seed: int, variant: str, count: int, tokens: int, options: dict) -> list[dict]:
    """A line for every number of pages at which questions are asked."""
    pages = make_pages(tokenizer, seed, count, tokens)
    full = variant == "full"
    cache = transformers.DynamicCache(config=model.config) if full else mixkv.MixKVCache(model, **options)
    lines = []
    for number, (page, _, _) in enumerate(pages, 1):
        if full:
            model(page, **cache_argument(cache), logits_to_keep=1)
        else:
            mixkv.read(model, input_ids=page, cache=cache, progress=False)
        if number * 4 % count == 0:
            chance = random.Random(f"asked {seed} {number}")
            asked = chance.sample(pages[:number], min(QUESTIONS, number))
            found = [ask(model, cache, *part[1:]) for part in asked]
            lines.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "pages": number,
                    "tokens": cache.get_seq_length(),
                    "bytes": sum(map(held_bytes, cache.layers)),
                    "right": statistics.fmean(right for right, _ in found),
                    "loss": statistics.fmean(loss for _, loss in found),
                }
            )
            print(json.dumps(lines[-1]), flush=True)
    if not full:
        mixkv.unpatch(model)
    return lines


def draw(lines: list[dict], path: Path) -> None:
    """Bytes held and answers right against pages read, the mean over seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, field, scale, label in zip(axes, ("bytes", "right"), (2**-20, 100), ("MiB held", "% of answers right")):
        for variant in dict.fromkeys(line["variant"] for line in lines):
            mine = [line for line in lines if line["variant"] == variant]
            counts = sorted({line["pages"] for line in mine})
            means = [statistics.fmean(scale * line[field] for line in mine if line["pages"] == count) for count in counts]
            axis.plot(counts, means, marker="o", label=variant)
        axis.set(xlabel="pages read", ylabel=label, ylim=(0, None))
    axes[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=48)
    parser.add_argument("--page-tokens", type=int, default=128)
    parser.add_argument("--each", type=int, default=40, help="budget of every page under turns='each'")
    parser.add_argument("--all", type=int, default=512, help="budget of everything under turns='all'")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--seeds", default="1,3")
    parser.add_argument("--variants", default="full,each,all")
    parser.add_argument("--out", type=Path, help="appends a line for every measurement")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.pages % 4:
        parser.error(f"--pages {args.pages} must be a multiple of 4: questions are asked after every quarter")
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = smollm2.load()
    budgets, lines = {"each": args.each, "all": args.all}, []
    for seed in map(int, args.seeds.split(",")):
        for variant in args.variants.split(","):
            options = {"turns": variant, "score": "replay", "budget": budgets.get(variant), "window": args.window}
            found = stream(model.eval(), tokenizer, seed, variant, args.pages, args.page_tokens, options)
            lines += found
            if args.out:
                with args.out.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in found)
    if args.figure:
        draw(lines, args.figure)


if __name__ == "__main__":
    main()
