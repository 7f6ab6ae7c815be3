"""The compiled operations on a GPU: builds them, checks each against plain torch, times them. One table, one JSON file.

    python benchmarks/gpu.py [--out DIR] [--quick] [--no-check]

Needs an NVIDIA GPU, torch with CUDA, and nvcc unless a built library is at hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mixkv.ops import flash, native, native_scores, reference, score_reference  # noqa: E402
from mixkv.ops.arguments import LogitOptions, RaggedBuffers  # noqa: E402
from mixkv.ops.check_stores import clean  # noqa: E402
from mixkv.ops.self_check import Checks  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((64, 64), (128, 128), (256, 256), (16, 16), (80, 80), (96, 48), (192, 128), (16, 256))
# Batch rows, KV heads, query heads a KV head, longest sequence.
SHAPES = ((1, 2, 4, 100), (2, 3, 7, 700), (1, 1, 20, 140), (3, 2, 1, 30), (1, 2, 16, 5000))
MILLION = 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--quick", action="store_true", help="half of the head sizes")
    parser.add_argument("--no-check", action="store_true", help="timings only")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"benchmarks/gpu.py: no CUDA device is visible to torch {torch.__version__}; run it on a machine with an NVIDIA GPU"
        )
        return 2
    started = time.perf_counter()
    for device in ("cpu", "cuda"):
        status = native.status(device)
        if not status.available:
            print(f"benchmarks/gpu.py: there are no compiled operations for {device}: {status.reason}")
            return 3
    report = {
        "machine": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "library": native.status("cuda").built,
        "build_seconds": round(time.perf_counter() - started, 1),
        "checks": None,
        "rows": [],
    }
    if not given.no_check:
        report["checks"] = check(given.quick)
    with torch.inference_mode():
        report["rows"] = time_attend() + time_decode_step() + time_window()
    show(report)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', report['machine'].lower()).strip('-')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")
    return 1 if report["checks"] and report["checks"]["failures"] else 0


# Checks.


@torch.inference_mode()
def check(quick: bool) -> dict:
    """Every operation against its plain-torch twin."""
    checks = Checks("native", torch.device("cuda"))
    checks.run(DTYPES, SIZES[:4] if quick else SIZES, SHAPES)
    check_graph(checks)
    print(f"checked {checks.count} calls against plain torch: {len(checks.failures)} failures")
    for failure in checks.failures[:20]:
        print(f"  {failure}")
    return {"count": checks.count, "failures": checks.failures, "worst_error": checks.worst}


def ints(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def check_graph(checks: Checks) -> None:
    """A captured decode step replays: lengths live on the device."""
    store, logits = checks.stores.make(64, 64, [30, 50], torch.bfloat16, spare=40), LogitOptions(0.1)
    query, key = checks.stores.strided(1, 1, 8, 64, torch.bfloat16), torch.randn(1, 2, 1, 64, device="cuda").bfloat16()
    first = store.lengths.clone()

    def step():
        return native.append_attend(query, store, key, key, 7, logits, max_length=90)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    exact = reference.attend(query, clean(store), logits, max_length=90, stride=None)
    good = torch.equal(store.lengths, first + 6) and torch.allclose(out.float(), exact.float(), atol=2e-2)
    checks.verdict("append_attend in a CUDA graph", good)


# Timings.


def device_seconds(call, repeats: int = 30) -> float:
    """Median time on the device of one call."""
    for _ in range(5):
        call()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3


def row(what: str, seconds: float, note: str = "") -> dict:
    return {"what": what, "microseconds": round(seconds * MILLION, 2), "note": note}


def copy_bandwidth() -> float:
    """Bytes read and written each second by a copy much larger than the caches."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_seconds(lambda: target.copy_(source))


def rivals() -> list[tuple[str, object]]:
    found = []
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12):
        found.append(("torch varlen", flash.torch_attend))
    if importlib.util.find_spec("flash_attn"):
        found.append(("flash-attn (packed each call)", flash.flash_attend))
    return found


def flash_packed(query, key, value, starts, counts, max_length, scaling):
    """flash-attn over sequences that already lie without gaps, as they do here: what its kernel alone takes."""
    from flash_attn import flash_attn_varlen_func

    sequences = starts.numel()
    folded = query.reshape(sequences, -1, query.shape[-1])
    ones = torch.arange(sequences + 1, dtype=torch.int32, device="cuda")
    ends = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    keys, values = key.unsqueeze(1), value.unsqueeze(1)
    return lambda: flash_attn_varlen_func(folded, keys, values, ones, ends, 1, max_length, softmax_scale=scaling)


def time_attend() -> list[dict]:
    """32/8/128 heads, batch 16, lengths about 8192, bfloat16."""
    bandwidth = copy_bandwidth()
    rows = [{"what": "copy bandwidth", "gigabytes_per_second": round(bandwidth / 1e9, 1), "note": "read + written"}]
    batch, heads, groups, size = 16, 8, 4, 128
    generator = random.Random(0)
    cases = {
        "lengths 7680..8704": [generator.randint(7680, 8704) for _ in range(batch * heads)],
        "lengths 256..16384": [generator.randint(256, 16384) for _ in range(batch * heads)],
    }
    for name, lengths in cases.items():
        total = sum(lengths)
        counts = ints(lengths)
        starts = (counts.cumsum(0) - counts).int()
        key, value = (torch.randn(total, size, device="cuda").bfloat16() for _ in range(2))
        query = torch.randn(batch, heads * groups, 1, size, device="cuda").bfloat16()
        store = RaggedBuffers(key, value, torch.zeros(total, dtype=torch.int32, device="cuda"), starts, counts)
        logits, extent = LogitOptions(size**-0.5), {"max_length": max(lengths), "stride": None}
        floor = (key.nbytes + value.nbytes) / bandwidth

        def note(seconds, floor=floor):
            return f"{100 * floor / seconds:.0f} % of copy bandwidth"

        mine = device_seconds(lambda: native.attend(query, store, logits, **extent))
        rows.append(row(f"attend 32/8/128 B16 {name}", mine, note(mine)))
        wanted = native.attend(query, store, logits, **extent)
        for rival, attend in rivals():
            try:
                out = attend(query, store, logits, **extent)
                close = torch.allclose(out.float(), wanted.float(), atol=2e-2)
                seconds = device_seconds(lambda: attend(query, store, logits, **extent))
                rows.append(row(f"  {rival}", seconds, note(seconds) + ("" if close else ", ANOTHER RESULT")))
            except Exception as error:
                rows.append({"what": f"  {rival}", "note": f"failed: {str(error).splitlines()[0][:80]}"})
        if importlib.util.find_spec("flash_attn"):
            seconds = device_seconds(flash_packed(query, key, value, starts, counts, max(lengths), size**-0.5))
            rows.append(row("  flash-attn, rows packed already", seconds, note(seconds)))
    return rows


def step_seconds(step, begin, steps: int = 32, repeats: int = 40) -> float:
    """Median wall time of one step in runs of ``steps``, host included; ``begin`` precedes each run, untimed."""
    times = []
    for repeat in range(repeats + 5):
        begin()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for index in range(steps):
            step(index)
        torch.cuda.synchronize()
        if repeat >= 5:
            times.append((time.perf_counter() - started) / steps)
    return statistics.median(times)


def time_decode_step() -> list[dict]:
    """One layer's append and attend at budget 128, batch 1, bfloat16, against SDPA over a dense cache of the same size."""
    heads, groups, size, budget, steps = 8, 4, 128, 128, 32
    capacity = budget + steps
    rows = []
    for what, lengths in {
        "even": [budget] * heads,
        "32..400 a head": [32, 400, 64, 200, 48, 120, 96, 64],
    }.items():
        counts = ints(lengths)
        first = counts.clone()
        starts = ints([sum(lengths[:h]) + h * steps for h in range(heads)])
        total = sum(lengths) + heads * steps
        store = RaggedBuffers(
            torch.randn(total, size, device="cuda").bfloat16(),
            torch.randn(total, size, device="cuda").bfloat16(),
            torch.zeros(total, dtype=torch.int32, device="cuda"),
            starts,
            counts,
        )
        query = torch.randn(1, heads * groups, 1, size, device="cuda").bfloat16()
        key, value = (torch.randn(1, heads, 1, size, device="cuda").bfloat16() for _ in range(2))

        def fused(index, store=store, longest=max(lengths)):
            logits = LogitOptions(size**-0.5)
            native.append_attend(query, store, key, value, index, logits, max_length=longest + index + 1)

        rows.append(
            row(
                f"append + attend 32/8/128 B1 budget 128, {what}",
                step_seconds(fused, lambda: counts.copy_(first)),
                "wall, host included",
            )
        )
        counts.copy_(first)
        seconds = device_seconds(lambda: fused(0) or counts.copy_(first))
        rows.append(row("  one call and a copy of 8 integers", seconds, "between events"))
    query = torch.randn(1, heads * groups, 1, size, device="cuda").bfloat16()
    key, value = (torch.randn(1, heads, 1, size, device="cuda").bfloat16() for _ in range(2))
    keys, values = (torch.randn(1, heads, capacity, size, device="cuda").bfloat16() for _ in range(2))

    def dense(index):
        end = budget + index + 1
        keys[:, :, end - 1 : end] = key
        values[:, :, end - 1 : end] = value
        F.scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end], enable_gqa=True)

    held = {}

    def concatenate(index):
        held["key"], held["value"] = torch.cat([held["key"], key], dim=2), torch.cat([held["value"], value], dim=2)
        F.scaled_dot_product_attention(query, held["key"], held["value"], enable_gqa=True)

    def reset():
        held.update(key=keys[:, :, :budget].clone(), value=values[:, :, :budget].clone())

    rows.append(row("  torch SDPA, dense cache written in place", step_seconds(dense, lambda: None), "wall, host included"))
    rows.append(row("  torch SDPA, dense cache concatenated", step_seconds(concatenate, reset), "wall, host included"))
    return rows


def time_window() -> list[dict]:
    """32/8/128 heads, N 8192, a window of 32, bfloat16."""
    bandwidth = copy_bandwidth()
    query = torch.randn(1, 32, 32, 128, device="cuda").bfloat16()
    key = torch.randn(1, 8, 8192, 128, device="cuda").bfloat16()

    def peak(call) -> int:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    rows = [row("window_scores 32/8/128 N 8192: one read of the keys", key.nbytes / bandwidth, "at copy bandwidth")]
    for name, function in (("compiled", native_scores.window_attention), ("plain torch", score_reference.window_attention)):

        def call(function=function):
            return function(query, key, None, LogitOptions(128**-0.5))

        rows.append(row(f"  {name}", device_seconds(call), f"{peak(call) / 1e6:.1f} MB extra"))
    return rows


def show(report: dict) -> None:
    print(f"\n{report['machine']}, torch {report['torch']}, CUDA {report['cuda']}, library {report['library']}")
    width = max(len(item["what"]) for item in report["rows"])
    for item in report["rows"]:
        figure = f"{item['microseconds']:>10.1f} us" if "microseconds" in item else ""
        figure = f"{item['gigabytes_per_second']:>8.1f} GB/s" if "gigabytes_per_second" in item else figure
        print(f"{item['what']:<{width}}  {figure:>13}  {item['note']}")


if __name__ == "__main__":
    sys.exit(main())
