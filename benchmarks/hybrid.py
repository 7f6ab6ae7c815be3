"""Time, memory and transfers of a decode step of hybridkv, compared with the full cache and snapkv at equal resident KV entries.

    python benchmarks/hybrid.py [--tokens N] [--budget 0.1,0.2] [--steps 32] [--threads N] [--random] [--json FILE]

On a CPU: SmolLM2-135M after 8,192 tokens of English text. With ``--random``, and on a GPU unless there is ``--model``: a random
llama, of SmolLM2's shape on a CPU, of a 7B model's on a GPU, after 32,768 random tokens. A random model's heads attend alike;
``--dynamic`` is then the share of them that is dynamic, the least sparse ones. With ``--model`` and SmolLM2 the threshold
decides.

All caches decode one token each, turn by turn. A figure is a median over the turns, a ratio the median of ratios within a turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mixkv import MixKVConfig  # noqa: E402
from mixkv.evaluation import loading, machine, measure, prompts  # noqa: E402

SHAPES = {
    "cpu": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        layers=30,
        query_heads=9,
        heads=3,
        size=64,
        dtype=torch.float32,
    ),
    "cuda": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        layers=32,
        query_heads=32,
        heads=8,
        size=128,
        dtype=torch.bfloat16,
    ),
}
MEBIBYTE = 2**20


def random_model(device: str, tokens: int) -> LlamaForCausalLM:
    """A llama of the shape that `SHAPES` names, with queries and keys of unit variance."""
    shape = SHAPES[device]
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["query_heads"],
        num_key_value_heads=shape["heads"],
        head_dim=shape["size"],
        max_position_embeddings=tokens,
        initializer_range=shape["hidden_size"] ** -0.5,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=shape["dtype"], attn_implementation="sdpa").eval()


def threshold_for(model, ids: torch.Tensor, budget: float, share: float) -> float:
    """The threshold for which a ``share`` of the heads is dynamic."""
    config = MixKVConfig(method="hybridkv", budget=budget, hybrid_threshold=0.0)
    found = measure.read_prompt(model, ids, config).cache.stats()["sparsity"]
    return float(torch.cat([part.flatten() for part in found]).quantile(share))


def bytes_read(cache) -> int:
    """Bytes of keys, values and bounds that a decode step reads, in all layers."""
    numbers = cache.stats() if hasattr(cache, "stats") else None
    if numbers is None:
        return measure.held(cache).bytes
    row = sum(cache.layers[0].shape[1:]) * cache.layers[0].dtype.itemsize
    return numbers["rows"] * row + numbers["bytes_bounds"]


def run(model, ids: torch.Tensor, fed: torch.Tensor, configs: dict[str, MixKVConfig | None], steps: int) -> list[dict]:
    """Prefills every cache with ``ids`` [1, N] and feeds each of them ``fed`` [steps, 1]."""
    caches = {}
    for name, config in configs.items():
        print(f"reading {ids.shape[1]} tokens: {name}", file=sys.stderr, flush=True)
        caches[name] = measure.read_prompt(model, ids, config).cache
    turns = [
        {name: seconds for name, (_, seconds) in outcome.items()} for outcome in measure.rounds(model, caches, fed[: steps + 2])
    ][2:]
    records = []
    for name, cache in caches.items():
        numbers = cache.stats() if configs[name] is not None else {}
        held = measure.held(cache)
        chunks = numbers.get("chunks") or dict.fromkeys(("chosen", "reused", "moved", "moved_bytes"), 0.0)
        dynamic = [part for part in numbers.get("dynamic", []) if part is not None]
        records.append(
            {
                "cache": name,
                "step_seconds": median(turn[name] for turn in turns),
                "step_to_full": measure.median_ratio(turns, name, "full"),
                "dynamic_heads": mean(float(part.float().mean()) for part in dynamic) if dynamic else 0.0,
                "resident_rows_per_head": held.rows_per_head,
                "bytes": held.bytes,
                "bytes_resident": numbers.get("bytes_resident", held.bytes),
                "bytes_outside": numbers.get("bytes_outside", 0),
                "bytes_read_a_step": bytes_read(cache),
                **{f"chunks_{key}_a_step": chunks[key] for key in ("chosen", "reused", "moved")},
                "bytes_moved_a_step": chunks["moved_bytes"],
            }
        )
    return records


def print_table(records: list[dict]) -> None:
    print(
        "| cache | step, ms | x full | dynamic heads | resident, MiB | outside | read a step | moved a step | chunks chosen, reused |"
    )
    print("|---" * 9 + "|")
    for record in records:
        sizes = (
            record[key] / MEBIBYTE for key in ("bytes_resident", "bytes_outside", "bytes_read_a_step", "bytes_moved_a_step")
        )
        print(
            f"| {record['cache']} | {1e3 * record['step_seconds']:.1f} | {record['step_to_full']:.2f} | {record['dynamic_heads']:.0%} | "
            + " | ".join(f"{size:.2f}" for size in sizes)
            + f" | {record['chunks_chosen_a_step']:.0f}, {record['chunks_reused_a_step']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="default: 8,192 on a CPU, 32,768 on a GPU")
    parser.add_argument("--budget", default="0.1,0.2", help="shares of the prompt (default 0.1,0.2)")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--model", help="a Hugging Face id or a folder")
    parser.add_argument("--random", action="store_true", help="a random llama in place of SmolLM2")
    parser.add_argument("--dynamic", type=float, default=0.15, help="share of a random model's heads (default 0.15)")
    parser.add_argument("--backend", default="auto", help="see MixKVConfig; 'native' asks for the compiled operations on a GPU")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() and not given.cpu else "cpu"
    tokens = given.tokens or {"cpu": 8192, "cuda": 32768}[device]
    random = given.random or (device == "cuda" and given.model is None)
    new = given.steps + 2
    if random:
        model, name = random_model(device, tokens + new), f"random llama, {device} shape"
        ids, fed = (
            torch.randint(model.config.vocab_size, (1, tokens), device=device),
            torch.randint(1000, (new, 1), device=device),
        )
    else:
        loaded = loading.load(given.model, device=device)
        model, name = loaded.model, loaded.name
        # The context of SmolLM2 is 8,192 tokens, including the decoded ones.
        room = model.config.get_text_config(decoder=True).max_position_embeddings - new
        ids, fed = (prompts.filler(loaded.tokenizer, count).to(device) for count in (min(tokens, room), new))
        fed = fed.T
    others = machine.Others()
    records = []
    for budget in map(float, given.budget.split(",")):
        options = dict(budget=budget, backend=given.backend)
        hybrid = dict(method="hybridkv", **options)
        if random:
            hybrid["hybrid_threshold"] = threshold_for(model, ids, budget, given.dynamic)
        configs = {"full": None, f"snapkv {budget}": MixKVConfig(method="snapkv", **options)}
        configs[f"hybridkv {budget}"] = MixKVConfig(**hybrid)
        if device == "cuda":
            configs[f"hybridkv {budget}, on the device"] = MixKVConfig(offload=False, **hybrid)
        records += run(model, ids, fed, configs, given.steps)
    print(f"\n{name}, {model.dtype}, {ids.shape[1]} tokens, {torch.get_num_threads()} threads\n")
    print_table(records)
    crowded = machine.crowded(used := others.cores())
    if crowded:
        print(f"\n{crowded}")
    if given.json:
        described = {**machine.describe(model.device), "cores_used_by_others": used}
        report = {"machine": described, "versions": machine.versions(), "model": name, "tokens": ids.shape[1], "runs": records}
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
