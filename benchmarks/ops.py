"""Times the compiled operations on the CPU and their alternatives in plain torch.

    python benchmarks/ops.py [--threads 1 2] [--repeats 60] [--only attend append window select rows]

Repeats of all candidates are interleaved, so that a busy machine slows each alike; a figure is the median in microseconds.

attend: decode attention over ragged lengths, uniform in 64 .. 1024. The candidates are
    native     the compiled operation, on flat storage
    padded     scaled_dot_product_attention on keys and values already padded to the longest, G query heads folded into rows
    loop       one scaled_dot_product_attention for each KV head, on views of flat storage
    groups     KV heads of similar length (up to a multiple of 128) padded together, one call for each group
The plain candidates get their padded tensors and masks for nothing: only attention itself is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from mixkv import MixKVConfig, Selection, registry, select
from mixkv.hf import output_projection
from mixkv.ops import native, native_scores, reference, score_reference
from mixkv.ops.arguments import LogitOptions, RaggedBuffers

SHAPES = [(9, 3, 64), (32, 8, 128)]


def interleaved(candidates: dict, repeats: int) -> dict[str, float]:
    """Median microseconds of each candidate."""
    times = {name: [] for name in candidates}
    for repeat in range(repeats + 3):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if repeat >= 3:
                times[name].append((time.perf_counter() - began) * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def ragged(sequences: int, size: int, dtype: torch.dtype, low: int = 64, high: int = 1024, spare: int = 16) -> RaggedBuffers:
    lengths = torch.randint(low, high + 1, (sequences,), dtype=torch.int32)
    starts = ((lengths + spare).cumsum(0) - lengths - spare).to(torch.int32)
    rows = int(lengths.sum()) + spare * sequences
    key, value = (torch.randn(rows, size).to(dtype) for _ in range(2))
    return RaggedBuffers(key, value, torch.zeros(rows, dtype=torch.int32), starts, lengths)


def attend_candidates(query, store, scaling) -> dict:
    key, value, starts, lengths = store.key, store.value, store.starts, store.lengths
    batch, query_heads, _, size = query.shape
    heads = starts.numel() // batch
    groups = query_heads // heads
    longest = int(lengths.max())
    folded = query.reshape(batch * heads, 1, groups, size)
    spans = [(int(start), int(start + length)) for start, length in zip(starts, lengths, strict=True)]

    def pad(indices):
        width = max(spans[i][1] - spans[i][0] for i in indices)
        keys, values = key.new_zeros(len(indices), 1, width, size), value.new_zeros(len(indices), 1, width, size)
        mask = torch.zeros(len(indices), 1, 1, width, dtype=torch.bool)
        for row, i in enumerate(indices):
            count = spans[i][1] - spans[i][0]
            keys[row, 0, :count], values[row, 0, :count] = key[slice(*spans[i])], value[slice(*spans[i])]
            mask[row, ..., :count] = True
        return torch.tensor(indices), keys, values, mask

    buckets: dict[int, list[int]] = {}
    for i, (start, end) in enumerate(spans):
        buckets.setdefault((end - start + 127) // 128, []).append(i)
    _, padded_keys, padded_values, padded_mask = pad(range(len(spans)))
    grouped = [pad(indices) for indices in buckets.values()]
    padded_query = query.reshape(batch, heads, groups, size)
    padded_keys, padded_values = (part.view(batch, heads, longest, size) for part in (padded_keys, padded_values))
    padded_mask = padded_mask.view(batch, heads, 1, longest)

    def loop():
        out = torch.empty_like(folded)
        for i, (start, end) in enumerate(spans):
            out[i] = F.scaled_dot_product_attention(
                folded[i], key[start:end].unsqueeze(0), value[start:end].unsqueeze(0), scale=scaling
            )
        return out

    def length_groups():
        out = torch.empty_like(folded)
        for indices, keys, values, mask in grouped:
            out[indices] = F.scaled_dot_product_attention(folded[indices], keys, values, attn_mask=mask, scale=scaling)
        return out

    return {
        "native": lambda: native.attend(query, store, LogitOptions(scaling), max_length=longest),
        "padded": lambda: F.scaled_dot_product_attention(
            padded_query, padded_keys, padded_values, attn_mask=padded_mask, scale=scaling
        ),
        "loop": loop,
        "groups": length_groups,
    }


def bench_attend(threads: list[int], repeats: int) -> None:
    print("| Hq/Hkv/D | batch | dtype | threads | native | padded | loop | groups | best plain / native |\n" + "|---" * 9 + "|")
    for (query_heads, heads, size), batch, dtype, count in (
        (shape, batch, dtype, count)
        for shape in SHAPES
        for batch in (1, 4)
        for dtype in (torch.float32, torch.bfloat16)
        for count in threads
    ):
        torch.manual_seed(0)
        torch.set_num_threads(count)
        store = ragged(batch * heads, size, dtype)
        query = torch.randn(batch, query_heads, 1, size).to(dtype)
        candidates = attend_candidates(query, store, size**-0.5)
        expected = candidates["padded"]().flatten()
        torch.testing.assert_close(candidates["native"]().flatten(), expected, rtol=0.05, atol=0.02)
        times = interleaved(candidates, repeats)
        best = min(times[name] for name in ("padded", "loop", "groups"))
        cells = [f"{query_heads}/{heads}/{size}", batch, str(dtype)[6:], count, *(f"{value:.0f}" for value in times.values())]
        print("| " + " | ".join(str(cell) for cell in cells) + f" | {best / times['native']:.2f} |", flush=True)


def bench_append(threads: list[int], repeats: int) -> None:
    print("\nappend of one row, and append + attend in one call at 128 rows a sequence, 32/8/128, batch 1, fp32\n")
    print(
        "| rows stored a sequence | threads | native append | plain append | append_attend | plain both |\n" + "|---" * 6 + "|"
    )
    for rows, count in ((rows, count) for rows in (128, 4096, 65536) for count in threads):
        torch.manual_seed(0)
        torch.set_num_threads(count)
        store, logits = ragged(8, 128, torch.float32, rows, rows, spare=64), LogitOptions(0.1)
        new_key, new_value, query = torch.randn(1, 8, 1, 128), torch.randn(1, 8, 1, 128), torch.randn(1, 32, 1, 128)
        full = store.lengths.clone()

        def run(function):
            def timed():
                store.lengths.copy_(full)
                return function()

            return timed

        def plain_both():
            reference.append(store, new_key, new_value, 5)
            return reference.attend(query, store, logits, max_length=rows + 1, stride=rows + 64)

        candidates = {
            "native append": run(lambda: native.append(store, new_key, new_value, 5)),
            "plain append": run(lambda: reference.append(store, new_key, new_value, 5)),
        }
        if rows == 128:
            candidates["append_attend"] = run(
                lambda: native.append_attend(query, store, new_key, new_value, 5, logits, max_length=rows + 1)
            )
            candidates["plain both"] = run(plain_both)
        times = [f"{value:.1f}" for value in interleaved(candidates, repeats).values()]
        print("| " + " | ".join(str(cell) for cell in [rows, count, *times, *["-"] * (4 - len(times))]) + " |", flush=True)


def bench_extend(threads: list[int], repeats: int) -> None:
    print("\nattend_extend: n new positions over ragged lengths, 32/8/128, batch 1, fp32 and bf16\n")
    print("| n | dtype | threads | native | plain | plain / native |\n" + "|---" * 6 + "|")
    for new, dtype, count in (
        (new, dtype, count) for new in (2, 8, 32, 128, 512) for dtype in (torch.float32, torch.bfloat16) for count in threads
    ):
        torch.manual_seed(0)
        torch.set_num_threads(count)
        store = ragged(8, 128, dtype)
        longest = int(store.lengths.max())
        query, new_key, new_value = (torch.randn(1, n, new, 128).to(dtype) for n in (32, 8, 8))
        arguments = (query, store, new_key, new_value, LogitOptions(0.1))
        options = {"mask": None, "max_length": longest, "stride": None}
        times = interleaved(
            {
                "native": lambda: native.attend_extend(*arguments, **options),
                "plain": lambda: reference.attend_extend(*arguments, **options),
            },
            max(5, repeats // 4),
        )
        print(
            f"| {new} | {str(dtype)[6:]} | {count} | {times['native']:.0f} | {times['plain']:.0f} | {times['plain'] / times['native']:.2f} |",
            flush=True,
        )


def bench_rows(threads: list[int], repeats: int) -> None:
    print(
        "\nattend by row format: of as many rows a head, a window of 32 in 8 bits under int4; and compressing 4,096 tokens to them\n"
    )
    names = list(registry.FORMATS)
    titles = ["Hq/Hkv/D", "dtype", "rows a head", "threads", *names, *(f"{name} / full" for name in names[1:])]
    print(
        "| "
        + " | ".join([*titles, *(f"compress {name}" for name in names)])
        + " |\n"
        + "|---" * (len(titles) + len(names))
        + "|"
    )
    for shape, dtype, rows, count in itertools.product(SHAPES, (torch.float32, torch.bfloat16), (128, 1024, 4096), threads):
        torch.manual_seed(0)
        torch.set_num_threads(count)
        query_heads, heads, size = shape
        key, value = (torch.randn(1, heads, 4096, size).to(dtype) for _ in range(2))
        query, logits = torch.randn(1, query_heads, 1, size).to(dtype), LogitOptions(size**-0.5)
        selection = window_and_random(rows, heads)
        formats = {name: partial(registry.row_format(name).rows, key, value, selection, "native") for name in names}
        # Several stores, as a model has layers: one alone would stay in the processor's caches.
        stores = {name: [make().resident for _ in range(8)] for name, make in formats.items()}

        def run(name: str):
            return lambda: [store.attend(query, logits) for store in stores[name]]

        times = interleaved({name: run(name) for name in names}, max(5, repeats // 4))
        making = interleaved(formats, max(5, repeats // 8))
        cells = [f"{query_heads}/{heads}/{size}", str(dtype)[6:], rows, count, *(f"{times[name] / 8:.0f}" for name in names)]
        cells += [f"{times[name] / times['full']:.2f}" for name in names[1:]] + [f"{making[name]:.0f}" for name in names]
        print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def window_and_random(rows: int, heads: int, tokens: int = 4096, window: int = 32) -> Selection:
    """So many positions of every head, the last ``window`` tokens among them."""
    chosen = [torch.randperm(tokens - window)[: rows - window].sort().values for _ in range(heads)]
    last = torch.arange(tokens - window, tokens)
    positions = torch.cat([part for head in chosen for part in (head, last)]).to(torch.int32)
    ranks = torch.cat([torch.arange(rows - window), torch.full((window,), -1)]).repeat(heads).to(torch.int32)
    nothing = torch.zeros(1)
    return Selection(positions, ranks, torch.full((1, heads), rows), nothing, nothing)


def peak_extra(run) -> int:
    """The increase of the process's peak resident memory in a call, in bytes (Linux)."""

    def held(field):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    # Returns free memory to the system and resets the peak.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    run()
    return held("VmHWM") - before


def bench_window(threads: list[int], repeats: int) -> None:
    print("\nwindow_scores: 32/8/128, N 8192, W 32\n")
    print("| dtype | threads | native | plain | plain / native | native peak MB | plain peak MB |\n" + "|---" * 7 + "|")
    for dtype, count in ((dtype, count) for dtype in (torch.float32, torch.bfloat16) for count in threads):
        torch.manual_seed(0)
        torch.set_num_threads(count)
        query, key = torch.randn(1, 32, 32, 128).to(dtype), torch.randn(1, 8, 8192, 128).to(dtype)
        candidates = {
            "native": lambda: native_scores.window_attention(query, key, None, LogitOptions(0.1)),
            "plain": lambda: score_reference.window_attention(query, key, None, LogitOptions(0.1)),
        }
        torch.testing.assert_close(candidates["native"](), candidates["plain"](), rtol=1e-3, atol=1e-5)
        times = interleaved(candidates, max(5, repeats // 4))
        peaks = [peak_extra(run) / 2**20 for run in candidates.values()]
        cells = [
            f"{times['native']:.0f}",
            f"{times['plain']:.0f}",
            f"{times['plain'] / times['native']:.2f}",
            *(f"{p:.1f}" for p in peaks),
        ]
        print(f"| {str(dtype)[6:]} | {count} | " + " | ".join(cells) + " |", flush=True)


def bench_select(threads: list[int], repeats: int) -> None:
    print("\nselect, 32/8/128, N 8192, budget 128 (ms)\n")
    names = ["adakv mix", "adakv mix-output", "global mix-output"]
    print("| dtype | threads | " + " | ".join(names) + " | mix-output / mix |\n" + "|---" * (len(names) + 3) + "|")
    for dtype, count in ((dtype, count) for dtype in (torch.float32, torch.bfloat16) for count in threads):
        torch.manual_seed(0)
        torch.set_num_threads(count)
        query = torch.randn(1, 32, 32, 128).to(dtype)
        key, value = (torch.randn(1, 8, 8192, 128).to(dtype) for _ in range(2))
        factor = output_projection.factor(torch.randn(4096, 32 * 128), 8, 128)

        def run(name: str):
            method, score = name.split()
            config = MixKVConfig(method=method, score=score)
            options = {"output_factor": factor} if "output" in score else {}
            return lambda: select(query, key, value, config, **options)

        times = interleaved({name: run(name) for name in names}, max(5, repeats // 4))
        cells = [f"{times[name] / 1e3:.1f}" for name in names] + [f"{times[names[1]] / times[names[0]]:.2f}"]
        print(f"| {str(dtype)[6:]} | {count} | " + " | ".join(cells) + " |", flush=True)


BENCHES = {
    "attend": bench_attend,
    "append": bench_append,
    "extend": bench_extend,
    "window": bench_window,
    "select": bench_select,
    "rows": bench_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES))
    given = parser.parse_args()
    print(f"torch {torch.__version__}, compiled operations: {native.status()}\n")
    for name in given.only:
        BENCHES[name](given.threads, given.repeats)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
