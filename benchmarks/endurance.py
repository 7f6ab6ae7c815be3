"""Endurance: many generations in one process, and one long conversation in a bounded cache; what the process holds must not grow.

    python benchmarks/endurance.py [--generations 10000] [--turns 500] [--threads 8]

A tiny random model, so that the library does most of the work. Generations alternate between single prompts, padded batches, beams,
sampling, drafts and a cache that is saved and loaded; ``--threads`` threads generate on one model at the same time. Growth is of the
process's resident memory, after a warm-up of a tenth of the work.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mixkv
from mixkv.evaluation import memory
from mixkv.hf.versions import cache_argument

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(
        vocab_size=96, max_position_embeddings=1 << 16, eos_token_id=None, bos_token_id=0, pad_token_id=1, **sizes
    )
    return LlamaForCausalLM(config).eval()


def resident() -> int:
    """Bytes that the process has resident; what was freed is returned to the system first."""
    gc.collect()
    found = memory.start(torch.device("cpu"))
    if found is None:
        raise SystemExit("this system does not report what a process has resident: run on Linux")
    return found


def generations(model: LlamaForCausalLM, count: int, seed: int = 0) -> Iterator[None]:
    """Makes so many generations, one after the other, and yields after each."""
    chance = torch.Generator().manual_seed(seed)
    methods = itertools.cycle(name for name, method in mixkv.registry.METHODS.items() if not method.needs_profile)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            batch = 1 + number % 3
            ids = torch.randint(4, 90, (batch, 40 + number % 17), generator=chance)
            mask = torch.ones_like(ids)
            mask[-1, : number % 5 if batch > 1 else 0] = 0
            given = {"input_ids": ids, "attention_mask": mask}
            cache = mixkv.MixKVCache(model, method=next(methods), window=6, budget=16)
            kind = number % 5
            if kind == 0:
                model.generate(**given, **GREEDY, num_beams=3, **cache_argument(cache))
            elif kind == 1 and batch == 1:
                model.generate(**given, **GREEDY, prompt_lookup_num_tokens=3, **cache_argument(cache))
            elif kind == 2:
                model.generate(**given, max_new_tokens=4, do_sample=True, **cache_argument(cache))
            elif kind == 3:
                model.generate(**given, **GREEDY, **cache_argument(cache))
                cache.save(Path(folder) / "cache")
                mixkv.MixKVCache.load(Path(folder) / "cache", model)
            else:
                with mixkv.patched(model, window=6, budget=16):
                    model.generate(**given, **GREEDY)
            yield


def conversation(model: LlamaForCausalLM, turns: int) -> Iterator[mixkv.MixKVCache]:
    """A conversation of so many turns in one cache, which it yields after each."""
    chance = torch.Generator().manual_seed(1)
    cache = mixkv.MixKVCache(model, window=6, budget=32, turns="all")
    ids = torch.zeros(1, 0, dtype=torch.long)
    for number in range(turns):
        new = torch.randint(4, 90, (1, 5 + 7 * number % 40), generator=chance)
        ids = model.generate(torch.cat([ids, new], dim=1), **GREEDY, **cache_argument(cache))
        yield cache


def in_threads(model: LlamaForCausalLM, threads: int, count: int) -> None:
    """Generates in several threads on one model; every thread finds what it finds alone."""
    prompts = [torch.randint(4, 90, (1, 48), generator=torch.Generator().manual_seed(seed)) for seed in range(threads)]

    def answer(ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, **GREEDY, **cache_argument(mixkv.MixKVCache(model, window=6, budget=16)))

    alone, wrong = [answer(ids) for ids in prompts], []

    def work(index: int) -> None:
        for _ in range(count):
            if not torch.equal(answer(prompts[index]), alone[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if wrong:
        raise RuntimeError(f"threads {sorted(set(wrong))} found other tokens than alone")


def growth(steps: Iterator, count: int) -> tuple[int, int]:
    """Resident bytes after a tenth of ``count`` steps, and after the last."""
    warm = 0
    for number, _ in enumerate(steps, 1):
        if number == max(count // 10, 1):
            warm = resident()
    return warm, resident()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=10000)
    parser.add_argument("--turns", type=int, default=500)
    parser.add_argument("--threads", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny()
    for name, steps, count in (
        ("generations", generations(model, args.generations), args.generations),
        ("turns", conversation(model, args.turns), args.turns),
    ):
        warm, end = growth(steps, count)
        print(
            f"{count} {name}: {warm / 2**20:.1f} MiB after a tenth, {end / 2**20:.1f} MiB at the end, {end / warm - 1:+.2%}",
            flush=True,
        )
    before = resident()
    in_threads(model, args.threads, max(args.generations // 100, 1))
    print(f"{args.threads} threads: {before / 2**20:.1f} MiB before, {resident() / 2**20:.1f} MiB after")


if __name__ == "__main__":
    main()
