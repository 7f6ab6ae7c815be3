"""Compiled decode: graphs, breaks and recompilations, and a step's time against uncompiled steps and a compiled StaticCache.

    python benchmarks/compiled.py [--prompts 300,420,500,300,700] [--new 201] [--tokens 1000,4000] [--steps 40] [--threads 1]

SmolLM2-135M, or ``--model``. First ``generate`` answers every prompt compiled and uncompiled: there should be one graph, no break
and no recompilation, and the same tokens. Then, for every length of ``--tokens``, four caches decode one token each, turn by turn.
A figure is a median over the turns, a ratio the median of ratios within a turn. Only the forward is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import CompileConfig, DynamicCache, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mixkv  # noqa: E402
from mixkv.evaluation import loading, machine, measure, prompts  # noqa: E402
from mixkv.hf.versions import cache_argument, last_logits_only  # noqa: E402

ONE_GRAPH = {
    "cpu": CompileConfig(mode="default", fullgraph=True),
    "cuda": CompileConfig(mode="reduce-overhead", fullgraph=True),
}


def count(model, ids: list[torch.Tensor], new: int, config: mixkv.MixKVConfig) -> dict:
    """Answers every prompt compiled and uncompiled."""
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    compiled = ONE_GRAPH[model.device.type]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    equal, graphs, seconds = [], [], []
    for prompt in ids:
        with mixkv.patched(model, config.replace(compile=False)):
            expected = model.generate(prompt, **options)
        began = time.perf_counter()
        with mixkv.patched(model, config.replace(compile=True)):
            found = model.generate(prompt, **options, compile_config=compiled)
        seconds.append(time.perf_counter() - began)
        equal.append(torch.equal(found, expected))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    counters = torch._dynamo.utils.counters
    return {
        "prompts": [prompt.shape[1] for prompt in ids],
        "steps": new - 1,
        "graphs": graphs[-1],
        "recompilations": graphs[-1] - graphs[0],
        "breaks": sum(counters["graph_break"].values()),
        "equal_tokens": sum(equal),
        "generate_seconds": seconds,
    }


def times(model, ids: torch.Tensor, steps: int, config: mixkv.MixKVConfig, warm: int = 3) -> dict:
    """Seconds of a step after ``ids`` [1, N], of each cache in turns."""
    device, length = model.device, ids.shape[1]
    total = length + steps + warm
    held = {
        "full": DynamicCache(config=model.config),
        "static, compiled": StaticCache(config=model.config, max_cache_len=total),
        "mixkv": mixkv.MixKVCache(model, config),
        "mixkv, compiled": mixkv.MixKVCache(model, config.replace(compile=True)),
    }
    for cache in held.values():
        with torch.no_grad():
            model(ids, use_cache=True, **last_logits_only(model), **cache_argument(cache))
    held["mixkv, compiled"].expect_length(total)
    call = model.get_compiled_call(ONE_GRAPH[device.type])
    turns = []
    token = ids[:, -1:]
    for turn in range(steps + warm):
        seconds = {}
        names = list(held)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            inputs = model.prepare_inputs_for_generation(
                token,
                next_sequence_length=1,
                attention_mask=torch.ones(1, length + turn + 1, dtype=torch.long, device=device),
                position_ids=torch.tensor([[length + turn]], device=device),
                use_cache=True,
                **cache_argument(held[name]),
            )
            measure.synchronize(device)
            began = time.perf_counter()
            with torch.no_grad():
                (call if "compiled" in name else model)(**inputs, return_dict=True)
            measure.synchronize(device)
            seconds[name] = time.perf_counter() - began
        if turn >= warm:
            turns.append(seconds)
    return {
        "tokens": length,
        "rows": config.budget,
        "step_seconds": {name: median(turn[name] for turn in turns) for name in held},
        "compiled_to_uncompiled": measure.median_ratio(turns, "mixkv, compiled", "mixkv"),
        "compiled_to_static": measure.median_ratio(turns, "mixkv, compiled", "static, compiled"),
        "compiled_to_full": measure.median_ratio(turns, "mixkv, compiled", "full"),
    }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=numbers, default="300,420,500,300,700")
    parser.add_argument("--new", type=int, default=201)
    parser.add_argument("--tokens", type=numbers, default="1000,4000", help="prompts before the timed steps; empty: none")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="a Hugging Face id or a folder")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loaded = loading.load(given.model)
    model, config = loaded.model, mixkv.MixKVConfig(budget=given.budget, backend=given.backend)
    others = machine.Others()
    ids = [prompts.filler(loaded.tokenizer, length).to(model.device) for length in given.prompts]
    record = {"model": loaded.name, "threads": given.threads, "machine": machine.describe(model.device), "times": []}
    if ids:
        record["counts"] = count(model, ids, given.new, config)
        print(json.dumps(record["counts"]), flush=True)
    for length in given.tokens:
        found = times(model, prompts.filler(loaded.tokenizer, length).to(model.device), given.steps, config)
        record["times"].append(found)
        print(json.dumps(found), flush=True)
    if warning := machine.crowded(others.cores()):
        print(warning, file=sys.stderr)
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
