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

from mixkv.ops import flash, native, reference, score_reference  # noqa: E402
from mixkv.ops.arguments import ChosenChunks, LogitOptions, RaggedBuffers  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((64, 64), (128, 128), (256, 256), (16, 16), (80, 80), (96, 48), (192, 128), (16, 256))
# Batch rows, KV heads, query heads a KV head, longest sequence.
SHAPES = ((1, 2, 4, 100), (2, 3, 7, 700), (1, 1, 20, 140), (3, 2, 1, 30), (1, 2, 16, 5000))
# An operation may lose this many times what plain torch loses in the same precision, or this much outright.
LOSS_FACTOR = 3.0
LOSS_FLOOR = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
MILLION = 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--quick", action="store_true", help="a third of the checks")
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
        report["checks"] = Checks(given.quick).run()
    with torch.inference_mode():
        report["rows"] = time_attend() + time_decode_step() + time_window()
    show(report)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', report['machine'].lower()).strip('-')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")
    return 1 if report["checks"] and report["checks"]["failures"] else 0


# Checks.


def make_store(batch, heads, size, value_size, lengths, dtype, spare=24):
    """Flat storage of normal rows; what no sequence owns is NaN."""
    starts, at = [], 3
    for length in lengths:
        starts.append(at)
        at += length + spare + random.randint(0, 5)
    owned = torch.zeros(at + 2, dtype=torch.bool)
    for start, length in zip(starts, lengths):
        owned[start : start + length] = True
    buffers = [
        torch.randn(at + 2, width).masked_fill(~owned.unsqueeze(1), torch.nan).to(dtype).cuda() for width in (size, value_size)
    ]
    buffers.append(torch.full((at + 2,), -7, dtype=torch.int32, device="cuda"))
    return RaggedBuffers(*buffers, ints(starts), ints(lengths))


def ints(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def strided(batch, rows, heads, size, dtype) -> torch.Tensor:
    """[batch, heads, rows, size] in one of the layouts that models produce."""
    layout = random.choice(("dense", "transposed", "slice"))
    if layout == "dense":
        return torch.randn(batch, heads, rows, size, device="cuda").to(dtype)
    extra = 24 if layout == "slice" else 0
    whole = torch.randn(batch, rows, heads, size + extra, device="cuda").to(dtype)
    # An odd offset: rows that do not begin at a multiple of 16 bytes.
    return whole[..., extra // 8 : extra // 8 + size].transpose(1, 2)


def clean(store: RaggedBuffers, dtype: torch.dtype | None = None) -> RaggedBuffers:
    """A copy without NaNs, its rows in ``dtype``: plain torch reads spare rows, masked."""
    key, value = (part.nan_to_num(0.0).to(dtype or part.dtype) for part in (store.key, store.value))
    return store._replace(key=key, value=value)


def copied(store: RaggedBuffers) -> RaggedBuffers:
    return RaggedBuffers(*(part.clone() for part in store))


def poison() -> None:
    """Leaves NaNs in the memory that the next outputs and scratch tensors get."""
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24):
        torch.full((size,), torch.nan, device="cuda")


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(
        found.nan_to_num(1.5) if found.is_floating_point() else found,
        wanted.nan_to_num(1.5) if wanted.is_floating_point() else wanted,
    )


class Checks:
    """Every operation against its plain-torch twin."""

    def __init__(self, quick: bool):
        self.quick, self.count, self.failures, self.worst = quick, 0, [], {}
        random.seed(1)
        torch.manual_seed(1)

    def run(self) -> dict:
        with torch.inference_mode():
            for dtype in DTYPES:
                for sizes in SIZES:
                    for shape in SHAPES:
                        if not self.quick or random.random() < 1 / 3:
                            self.attention(dtype, *sizes, *shape)
                    self.rows(dtype, *sizes)
                for size in (64, 80, 128, 192, 256):
                    self.window(dtype, size)
                for sizes in SIZES:
                    self.chunks(dtype, *sizes)
            self.other_stream()
            self.graph()
        print(f"checked {self.count} calls against plain torch: {len(self.failures)} failures")
        for failure in self.failures[:20]:
            print(f"  {failure}")
        worst = {f"{name} {dtype}": value for (name, dtype), value in self.worst.items()}
        return {"count": self.count, "failures": self.failures, "worst_error": worst}

    def verdict(self, what: str, good: bool) -> None:
        self.count += 1
        if not good:
            self.failures.append(what)

    def compare(self, what, dtype, found, twin, exact) -> None:
        """``found`` against ``exact``; ``twin`` is the result of plain torch for the same inputs."""
        exact = exact.nan_to_num(0.0).double()
        scale = exact.norm().item() + 1e-9
        error = ((found.double() - exact).norm() / scale).item()
        loss = ((twin.nan_to_num(0.0).double() - exact).norm() / scale).item()
        key = (what.split()[0], str(dtype).removeprefix("torch."))
        self.worst[key] = max(self.worst.get(key, 0.0), error)
        good = bool(found.isfinite().all()) and error <= max(LOSS_FACTOR * loss, LOSS_FLOOR[dtype])
        self.verdict(f"{what} {dtype}: error {error:.2e}, plain torch {loss:.2e}", good)

    def attention(self, dtype, size, value_size, batch, heads, groups, top) -> None:
        lengths = [min(top, random.choice((0, 1, 15, 16, 17, 64, top, random.randint(0, top)))) for _ in range(batch * heads)]
        lengths[random.randrange(len(lengths))] = top
        store = make_store(batch, heads, size, value_size, lengths, dtype)
        softcap = random.choice((None, None, 5.0))
        sinks = torch.randn(heads * groups, device="cuda") if random.random() < 0.4 else None
        logits = LogitOptions(size**-0.5, softcap, sinks)
        bound = {"max_length": top + random.choice((0, 70)), "stride": None}
        what = f"{size}/{value_size} B{batch} H{heads} G{groups} {lengths}"
        plain, wide = clean(store), clean(store, torch.float64)

        query = strided(batch, 1, heads * groups, size, dtype)
        poison()
        found = native.attend(query, store, logits, **bound)
        twins = (
            reference.attend(query, plain, logits, **bound),
            reference.attend(query.double(), wide, logits, **bound),
        )
        self.compare(f"attend {what}", dtype, found, *self.zeroed(twins, store.lengths, groups))

        new = random.choice((1, 2, 5, 19))
        query = strided(batch, new, heads * groups, size, dtype)
        key, value = strided(batch, new, heads, size, dtype), strided(batch, new, heads, value_size, dtype)
        mask = None
        if random.random() < 0.5:
            mask = (torch.rand(random.choice((1, batch)), 1, new, new, device="cuda") < 0.6) | torch.eye(
                new, device="cuda"
            ).bool()
        poison()
        found = native.attend_extend(query, store, key, value, logits, mask=mask, **bound)
        twin = reference.attend_extend(query, plain, key, value, logits, mask=mask, **bound)
        exact = reference.attend_extend(query.double(), wide, key.double(), value.double(), logits, mask=mask, **bound)
        self.compare(f"attend_extend n{new} {what}", dtype, found, twin, exact)

        query = query[:, :, :1]
        mine, theirs = copied(store), copied(store)
        reference.append(theirs, key, value, 50)
        poison()
        bound["max_length"] += new
        found = native.append_attend(query, mine, key, value, 50, logits, **bound)
        self.verdict(f"append_attend {dtype} {what}: stored", all(map(same, mine, theirs)))
        twin = reference.attend(query, clean(theirs), logits, **bound)
        exact = reference.attend(query.double(), clean(theirs, torch.float64), logits, **bound)
        self.compare(f"append_attend n{new} {what}", dtype, found, twin, exact)

    @staticmethod
    def zeroed(outputs, counts, groups):
        """Zeros for sequences without rows: what a softmax over nothing gives is torch's own affair."""
        empty = (counts == 0).view(outputs[0].shape[0], 1, -1).repeat_interleave(groups, dim=2).unsqueeze(-1)
        return tuple(out.masked_fill(empty, 0.0) for out in outputs)

    def rows(self, dtype, size, value_size) -> None:
        batch, heads = 2, 3
        for new in (1, 3, 64, 65, 150):
            lengths = [random.randint(0, 20) for _ in range(batch * heads)]
            mine = make_store(batch, heads, size, value_size, lengths, dtype, spare=new)
            theirs = copied(mine)
            key, value = strided(batch, new, heads, size, dtype), strided(batch, new, heads, value_size, dtype)
            valid = torch.rand(batch, new, device="cuda") < 0.6 if random.random() < 0.5 else None
            native.append(mine, key, value, 9, valid)
            reference.append(theirs, key, value, 9, valid)
            self.verdict(f"append n{new} {dtype} {size}/{value_size}", all(map(same, mine, theirs)))
        for tokens in (40, 3000):
            lengths = [random.choice((0, 1, tokens, random.randint(0, tokens))) for _ in range(batch * heads)]
            mine = make_store(batch, heads, size, value_size, lengths, dtype)
            theirs = copied(mine)
            key, value = strided(batch, tokens, heads, size, dtype), strided(batch, tokens, heads, value_size, dtype)
            positions = torch.cat([torch.randperm(tokens)[:length].sort().values for length in lengths]).int().cuda()
            native.compact(mine, key, value, positions)
            reference.compact(theirs, key, value, positions)
            self.verdict(f"compact N{tokens} {dtype} {size}/{value_size}", all(map(same, mine, theirs)))
            order = torch.tensor([3, 4, 5, 3, 4, 5, 0, 1, 2], device="cuda")
            source, moved = mine._replace(starts=mine.starts[order]), mine.lengths[order]
            to = make_store(3, heads, size, value_size, moved.tolist(), dtype)
            wanted = copied(to)
            native.move_rows(to, source, max_length=int(moved.max()))
            reference.move_rows(wanted, source, total=int(moved.sum()))
            self.verdict(f"move_rows N{tokens} {dtype} {size}/{value_size}", all(map(same, to, wanted)))

    def chunks(self, dtype, size, value_size) -> None:
        batch, heads, groups, chunk = 2, 3, random.choice((1, 4, 7)), random.choice((8, 32))
        lengths = [0, 1, 64, 700, 17, 5]
        store = make_store(batch, heads, size, value_size, lengths, dtype)
        query = strided(batch, 1, heads * groups, size, dtype)
        for slots in (1, 9, 40):
            pool = [torch.randn(400 * chunk, width).to(dtype).pin_memory() for width in (size, value_size)]
            rows = torch.randint(0, chunk + 1, (batch * heads, slots), dtype=torch.int32, device="cuda")
            places = torch.randperm(400, device="cuda")[: rows.numel()].view_as(rows).int() * chunk
            held = [torch.zeros(rows.numel() * chunk, width, dtype=dtype, device="cuda") for width in (size, value_size)]
            targets = torch.randperm(rows.numel(), device="cuda").view_as(rows).int() * chunk
            twins = [part.clone() for part in held]
            native.fetch_chunks(held, pool, places, targets, rows, chunk=chunk)
            reference.fetch_chunks(twins, pool, places, targets, rows, chunk=chunk)
            what = f"{size}/{value_size} G{groups} slots {slots}"
            self.verdict(f"fetch_chunks {dtype} {what}", all(map(same, held, twins)))
            logits, chosen = LogitOptions(size**-0.5, random.choice((None, 5.0))), ChosenChunks(*held, targets, rows, chunk)
            wide = chosen._replace(key=chosen.key.double(), value=chosen.value.double())
            poison()
            found = native.attend_chunks(query, store, chosen, logits, max_length=700)
            outputs = (
                reference.attend_chunks(query, clean(store), chosen, logits, max_length=700),
                reference.attend_chunks(query.double(), clean(store, torch.float64), wide, logits, max_length=700),
            )
            self.compare(f"attend_chunks {what}", dtype, found, *self.zeroed(outputs, store.lengths + rows.sum(1), groups))
        counts = ints([0, 1, 7, 400, 1024, 2])
        starts = (counts.cumsum(0) - counts).int()
        low, high = torch.randint(16, (2, int(counts.sum()), size), dtype=torch.uint8, device="cuda").sort(dim=0).values
        codes, grid = 16 * high + low, torch.rand(counts.numel(), 2, size, device="cuda") - 0.25
        poison()
        found = native.chunk_scores(query, codes, grid, starts, counts, longest=1030)
        exact = reference.chunk_scores(query.double(), codes, grid, starts, counts, longest=1030).double()
        real = exact.isfinite()
        good = (
            torch.equal(real, found.isfinite()) and (found.double() - exact)[real].abs().max() < 1e-5 * exact[real].abs().max()
        )
        self.verdict(f"chunk_scores {dtype} {size}/{value_size} G{groups}", bool(good))

    def window(self, dtype, size) -> None:
        for batch, heads, groups, window, tokens in (
            (1, 2, 4, 32, 3000),
            (2, 1, 1, 8, 130),
            (1, 1, 7, 20, 64),
            (2, 2, 2, 1, 129),
        ):
            query, key = strided(batch, window, heads * groups, size, dtype), strided(batch, tokens, heads, size, dtype)
            valid = None
            if random.random() < 0.5:
                valid = torch.ones(batch, 1, tokens, dtype=torch.bool, device="cuda")
                valid[:, :, : random.choice((0, 5, tokens - 3))] = False
            options = {"statistic": random.choice(("mean", "rms")), "group_reduce": random.choice(("mean", "max"))}
            sinks = torch.randn(heads * groups, device="cuda") if random.random() < 0.4 else None
            logits = LogitOptions(size**-0.5, random.choice((None, 5.0)), sinks)
            poison()
            found = native.window_attention(query, key, valid, logits, **options)
            exact = score_reference.window_attention(query.float(), key.float(), valid, logits, **options).double()
            error = ((found.double() - exact).norm() / (exact.norm() + 1e-9)).item()
            label = ("window_scores", str(dtype).removeprefix("torch."))
            self.worst[label] = max(self.worst.get(label, 0.0), error)
            self.verdict(
                f"window_scores {dtype} D{size} W{window} N{tokens}: error {error:.2e}",
                bool(found.isfinite().all()) and error < 2e-5,
            )

    def other_stream(self) -> None:
        """Work queued on a side stream is seen by an operation called there."""
        stream = torch.cuda.Stream()
        store = make_store(1, 2, 64, 64, [3000, 5000], torch.bfloat16)
        query, zeros = strided(1, 1, 8, 64, torch.bfloat16), torch.zeros_like(store.value)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            store.value.copy_(zeros)
            found = native.attend(query, store, LogitOptions(0.1), max_length=5000)
        stream.synchronize()
        self.verdict("attend on the current stream", not found.any().item())

    def graph(self) -> None:
        """A captured decode step replays: lengths live on the device."""
        store, logits = make_store(1, 2, 64, 64, [30, 50], torch.bfloat16, spare=40), LogitOptions(0.1)
        query, key = strided(1, 1, 8, 64, torch.bfloat16), torch.randn(1, 2, 1, 64, device="cuda").bfloat16()
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
        self.verdict("append_attend in a CUDA graph", good)


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
    for name, function in (("compiled", native.window_attention), ("plain torch", score_reference.window_attention)):

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
