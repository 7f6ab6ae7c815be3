"""Peak memory of compressing one layer's prompt, as a share of the layer's keys and values.

    python benchmarks/rank_memory.py [--tokens 32768] [--heads 8] [--groups 4] [--size 128]

For every method, score, back end and dtype on the CPU. ``allocated`` is what torch's allocator gave out, by its profiler;
``resident`` is what the process had resident, which also shows the scratch memory of compiled operations. Both are peaks beyond
what was in use before, less the bytes that the layer holds afterwards.
"""

from __future__ import annotations

import argparse
import ctypes
import sys

import torch

from mixkv import MixKVConfig, registry
from mixkv.evaluation import memory
from mixkv.selection.select import allocate, rank
from mixkv.storage.chunks import ChunkStore
from mixkv.storage.ragged import RaggedStore


def prompt(tokens: int, heads: int, groups: int, size: int, dtype: torch.dtype, window: int = 32) -> tuple[torch.Tensor, ...]:
    """query [1, heads * groups, window, size], key, value [1, heads, tokens, size] as models lay them out: tokens first."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, length: int) -> torch.Tensor:
        return torch.randn(1, length, count, size, generator=generator).to(dtype).transpose(1, 2)

    return draw(heads * groups, window), draw(heads, tokens), draw(heads, tokens)


def compress(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, config: MixKVConfig, factor: torch.Tensor | None
) -> tuple[RaggedStore, ChunkStore | None]:
    """What a layer does with a prompt: ranks its tokens, allocates rows and copies those that stay."""
    place = {"layer_idx": 0, "num_layers": 2}
    ranking = rank(query, key, value, config, output_factor=factor, **place)
    method = registry.method(config.method)
    if method.plan is None:
        return RaggedStore.from_selection(key, value, ranking.take(allocate(config, ranking, **place)), config.backend), None
    plan = method.plan(query, key, config, ranking)
    chunks = ChunkStore.from_plan(key, value, plan, config.backend)
    return RaggedStore.from_selection(key, value, plan.ranking.take(plan.entries), config.backend), chunks


def measure(config: MixKVConfig, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, factor: torch.Tensor | None):
    """Peak bytes beyond those held afterwards: ``(allocated, resident)``."""

    def run() -> int:
        stores = compress(query, key, value, config, factor)
        return sum(store.nbytes for store in stores if store is not None)

    with memory.allocations() as allocated:
        kept = run()
    peaks = []
    for _ in range(5):
        before = memory.start(key.device)
        run()
        peaks.append(memory.peak(key.device, before))
    # What libraries keep for later comes on top now and then.
    resident = None if None in peaks else max(min(peaks) - kept, 0)
    return allocated.peak - kept, resident


def return_memory_at_once() -> None:
    """Has the C library map every larger piece of memory by itself, so that what is freed is no longer resident."""
    if sys.platform == "linux":
        threshold = -3
        ctypes.CDLL(None).mallopt(threshold, 65536)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8, help="KV heads")
    parser.add_argument("--groups", type=int, default=4, help="query heads of a KV head")
    parser.add_argument("--size", type=int, default=128, help="head size")
    parser.add_argument("--backends", nargs="+", default=["native", "torch"])
    parser.add_argument("--methods", nargs="+", default=list(registry.METHODS))
    parser.add_argument("--scores", nargs="+", default=list(registry.SCORES))
    arguments = parser.parse_args()
    return_memory_at_once()
    print(f"{'dtype':9} {'backend':7} {'method':9} {'score':11} allocated resident")
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        query, key, value = prompt(arguments.tokens, arguments.heads, arguments.groups, arguments.size, dtype)
        factor = torch.randn(arguments.heads, arguments.size, arguments.size).triu()
        profile = torch.rand(2, arguments.heads, generator=torch.Generator().manual_seed(1)).tolist()
        whole = key.nbytes + value.nbytes
        for backend in arguments.backends:
            for method in arguments.methods:
                for score in arguments.scores:
                    config = MixKVConfig(
                        method=method,
                        score=score,
                        backend=backend,
                        profile=profile if registry.method(method).needs_profile else None,
                    )
                    allocated, resident = measure(config, query, key, value, factor)
                    worst = max(worst, allocated / whole, (resident or 0) / whole)
                    shown = "-" if resident is None else f"{resident / whole:8.3f}"
                    name = str(dtype).removeprefix("torch.")
                    print(f"{name:9} {backend:7} {method:9} {score:11} {allocated / whole:9.3f} {shown}", flush=True)
    print(f"largest share of the layer's keys and values: {worst:.3f}")


if __name__ == "__main__":
    main()
