"""Every operation of a back end against plain torch, over a small matrix of shapes, dtypes and lengths."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch

from . import dispatch, reference, score_reference, selection_reference
from . import step as decode_step
from .arguments import ChosenChunks, FixedRoom, LogitOptions, RaggedBuffers
from .check_stores import Stores, clean, copied, same

SIZES = ((64, 64), (128, 128), (96, 48))
# Batch rows, KV heads, query heads a KV head, longest sequence.
SHAPES = ((1, 2, 4, 100), (2, 3, 7, 700), (1, 2, 16, 5000))
# An operation may lose this many times what plain torch loses in the same precision, or this much outright.
LOSS_FACTOR = 3.0
LOSS_FLOOR = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Checks:
    """Compares the operations of ``backend`` on ``device``, as `dispatch` calls them, with plain torch.

    Attributes:
        count: comparisons made.
        failures: what failed, a line each.
        worst: the largest relative error by operation and dtype.
    """

    def __init__(self, backend: str, device: torch.device, seed: int = 1):
        self.backend, self.device = backend, device
        self.chance = random.Random(seed)
        self.count = 0
        self.failures: list[str] = []
        self.worst: dict[str, float] = {}
        # Only the compiled operations never read what no sequence owns.
        self.stores = Stores(device, self.chance, poisoned=backend == "native")
        torch.manual_seed(seed)

    @torch.inference_mode()
    def run(
        self,
        dtypes: Iterable[torch.dtype],
        sizes: Iterable[tuple[int, int]] = SIZES,
        shapes: Iterable[tuple[int, int, int, int]] = SHAPES,
    ) -> Checks:
        """All checks for every combination that the back end takes."""
        for dtype in dtypes:
            for size in sizes:
                if dispatch.why_not(self.backend, self.device, dtype, *size) is not None:
                    continue
                for shape in shapes:
                    self.attention(dtype, *size, *shape)
                self.rows(dtype, *size)
                self.chunks(dtype, *size)
                self.window(dtype, size[0])
        if self.device.type == "cuda" and self.backend == "native":
            self.other_stream()
        return self

    def verdict(self, what: str, good: bool) -> None:
        self.count += 1
        if not good:
            self.failures.append(what)

    def compare(self, what: str, dtype: torch.dtype, found: torch.Tensor, twin: torch.Tensor, exact: torch.Tensor) -> None:
        """``found`` against ``exact``; ``twin`` is the result of plain torch for the same inputs."""
        exact = exact.nan_to_num(0.0).double()
        scale = exact.norm().item() + 1e-9
        error = ((found.double() - exact).norm() / scale).item()
        loss = ((twin.nan_to_num(0.0).double() - exact).norm() / scale).item()
        key = f"{what.split()[0]} {str(dtype).removeprefix('torch.')}"
        self.worst[key] = max(self.worst.get(key, 0.0), error)
        good = bool(found.isfinite().all()) and error <= max(LOSS_FACTOR * loss, LOSS_FLOOR[dtype])
        self.verdict(f"{what} {dtype}: error {error:.2e}, plain torch {loss:.2e}", good)

    def attention(self, dtype: torch.dtype, size: int, value_size: int, batch: int, heads: int, groups: int, top: int) -> None:
        """append_attend, attend and attend_extend over one store."""
        chance, stores, backend = self.chance, self.stores, self.backend
        lengths = [min(top, chance.choice((1, 15, 16, 17, 64, top, chance.randint(1, top)))) for _ in range(batch * heads)]
        lengths[chance.randrange(len(lengths))] = top
        if backend == "native" and len(lengths) > 1:
            lengths[lengths.index(min(lengths))] = 0
        store = stores.make(size, value_size, lengths, dtype)
        sinks = torch.randn(heads * groups, device=self.device) if chance.random() < 0.4 else None
        logits = LogitOptions(size**-0.5, chance.choice((None, None, 5.0)), sinks)
        extent: dict[str, Any] = {"max_length": top + chance.choice((0, 70)), "stride": None}
        what = f"{size}/{value_size} B{batch} H{heads} G{groups} {lengths[:8]}"
        plain, wide = clean(store), clean(store, torch.float64)

        query = stores.strided(batch, 1, heads * groups, size, dtype)
        stores.poison()
        found = dispatch.attend(backend, query, store, logits, **extent)
        twins = (
            reference.attend(query, plain, logits, **extent),
            reference.attend(query.double(), wide, logits, **extent),
        )
        self.compare(f"attend {what}", dtype, found, *zeroed(twins, store.lengths, groups))

        new = chance.choice((1, 2, 5, 19))
        query = stores.strided(batch, new, heads * groups, size, dtype)
        key, value = stores.strided(batch, new, heads, size, dtype), stores.strided(batch, new, heads, value_size, dtype)
        mask = None
        if chance.random() < 0.5:
            mask = torch.rand(chance.choice((1, batch)), 1, new, new, device=self.device) < 0.6
            mask |= torch.eye(new, device=self.device).bool()
        stores.poison()
        found = dispatch.attend_extend(backend, query, store, key, value, logits, mask=mask, **extent)
        twin = reference.attend_extend(query, plain, key, value, logits, mask=mask, **extent)
        exact = reference.attend_extend(query.double(), wide, key.double(), value.double(), logits, mask=mask, **extent)
        self.compare(f"attend_extend n{new} {what}", dtype, found, twin, exact)

        query, key, value = (part[:, :, :1] for part in (query, key, value))
        mine, theirs = copied(store), copied(store)
        reference.append(theirs, key, value, 50)
        stores.poison()
        extent["max_length"] += 1
        found = dispatch.append_attend(backend, query, mine, key, value, 50, logits, **extent)
        self.verdict(f"append_attend {dtype} {what}: stored", all(map(same, mine, theirs)))
        twin = reference.attend(query, clean(theirs), logits, **extent)
        exact = reference.attend(query.double(), clean(theirs, torch.float64), logits, **extent)
        self.compare(f"append_attend {what}", dtype, found, twin, exact)

        # The same row by counts on the device.
        decode_step.prepare()
        mine = copied(store)
        room = FixedRoom(store.starts + store.lengths + 1, 50 - store.lengths)
        stores.poison()
        found = decode_step.step(backend, query, mine, room, key, value, logits, max_length=extent["max_length"])
        self.verdict(f"step {dtype} {what}: stored", all(map(same, mine, theirs)))
        self.compare(f"step {what}", dtype, found, twin, exact)

    def rows(self, dtype: torch.dtype, size: int, value_size: int) -> None:
        """append, gather and move_rows."""
        chance, stores, backend = self.chance, self.stores, self.backend
        batch, heads = 2, 3
        for new in (1, 3, 65):
            lengths = [chance.randint(1, 20) for _ in range(batch * heads)]
            mine = stores.make(size, value_size, lengths, dtype, spare=new)
            theirs = copied(mine)
            key, value = stores.strided(batch, new, heads, size, dtype), stores.strided(batch, new, heads, value_size, dtype)
            valid = torch.rand(batch, new, device=self.device) < 0.6 if chance.random() < 0.5 else None
            dispatch.append(backend, mine, key, value, 9, valid)
            reference.append(theirs, key, value, 9, valid)
            self.verdict(f"append n{new} {dtype} {size}/{value_size}", all(map(same, mine, theirs)))
        for tokens in (40, 1500):
            counts = [chance.choice((1, tokens, chance.randint(1, tokens))) for _ in range(batch * heads)]
            key = stores.strided(batch, tokens, heads, size, dtype)
            value = stores.strided(batch, tokens, heads, value_size, dtype)
            positions = torch.cat([torch.randperm(tokens)[:count].sort().values for count in counts]).int().to(self.device)
            lengths = torch.tensor(counts, device=self.device).view(batch, heads)
            mine = dispatch.gather(backend, key, value, positions, lengths)
            theirs = selection_reference.gather(key, value, positions, lengths)
            self.verdict(f"gather N{tokens} {dtype} {size}/{value_size}", all(map(same, held(mine), held(theirs))))
            order = torch.tensor([3, 4, 5, 3, 4, 5, 0, 1, 2], device=self.device)
            source, moved = mine._replace(starts=mine.starts[order]), mine.lengths[order]
            to = stores.make(size, value_size, moved.tolist(), dtype)
            wanted, total = copied(to), int(moved.sum())
            dispatch.move_rows(backend, to, source, total=total, max_length=int(moved.max()))
            reference.move_rows(wanted, source, total=total)
            self.verdict(f"move_rows N{tokens} {dtype} {size}/{value_size}", all(map(same, to, wanted)))

    def chunks(self, dtype: torch.dtype, size: int, value_size: int) -> None:
        """fetch_chunks, attend_chunks and chunk_scores."""
        chance, stores, backend = self.chance, self.stores, self.backend
        batch, heads, groups, chunk = 2, 3, chance.choice((1, 4, 7)), chance.choice((8, 32))
        lengths = [1, 1, 64, 700, 17, 5]
        store = stores.make(size, value_size, lengths, dtype)
        query = stores.strided(batch, 1, heads * groups, size, dtype)
        pinned = self.device.type == "cuda"
        for slots in (1, 40):
            key, value = (torch.randn(400 * chunk, width).to(dtype) for width in (size, value_size))
            pool = (key.pin_memory(), value.pin_memory()) if pinned else (key, value)
            rows = torch.randint(0, chunk + 1, (batch * heads, slots), dtype=torch.int32, device=self.device)
            places, targets = (
                torch.randperm(count, device=self.device)[: rows.numel()].view_as(rows).int() * chunk
                for count in (400, rows.numel())
            )
            mine = tuple(torch.zeros(rows.numel() * chunk, part.shape[1], dtype=dtype, device=self.device) for part in pool)
            theirs = (mine[0].clone(), mine[1].clone())
            dispatch.fetch_chunks(backend, mine, pool, places, targets, rows, chunk=chunk)
            reference.fetch_chunks(theirs, pool, places, targets, rows, chunk=chunk)
            what = f"{size}/{value_size} G{groups} slots {slots}"
            self.verdict(f"fetch_chunks {dtype} {what}", all(map(same, mine, theirs)))
            logits, chosen = LogitOptions(size**-0.5, chance.choice((None, 5.0))), ChosenChunks(*theirs, targets, rows, chunk)
            wide = chosen._replace(key=chosen.key.double(), value=chosen.value.double())
            stores.poison()
            found = dispatch.attend_chunks(backend, query, store, chosen, logits, max_length=700)
            twin = reference.attend_chunks(query, clean(store), chosen, logits, max_length=700)
            exact = reference.attend_chunks(query.double(), clean(store, torch.float64), wide, logits, max_length=700)
            self.compare(f"attend_chunks {what}", dtype, found, twin, exact)
        counts = stores.ints([0, 1, 7, 400, 1024, 2])
        starts = (counts.cumsum(0) - counts).int()
        levels = torch.randint(16, (2, int(counts.sum()), size), dtype=torch.uint8, device=self.device).sort(dim=0).values
        codes, grid = 16 * levels[1] + levels[0], torch.rand(counts.numel(), 2, size, device=self.device) - 0.25
        stores.poison()
        found = dispatch.chunk_scores(backend, query, codes, grid, starts, counts, longest=1030)
        exact = reference.chunk_scores(query.double(), codes, grid, starts, counts, longest=1030).double()
        real = exact.isfinite()
        difference = (found.double() - exact)[real].abs().max()
        good = torch.equal(real, found.isfinite()) and bool(difference < 1e-5 * exact[real].abs().max())
        self.verdict(f"chunk_scores {dtype} {size}/{value_size} G{groups}", good)

    def window(self, dtype: torch.dtype, size: int) -> None:
        """window_attention."""
        chance, stores = self.chance, self.stores
        for batch, heads, groups, window, tokens in ((1, 2, 4, 32, 3000), (2, 1, 1, 8, 130), (1, 1, 7, 20, 64)):
            query = stores.strided(batch, window, heads * groups, size, dtype)
            key = stores.strided(batch, tokens, heads, size, dtype)
            valid = None
            if chance.random() < 0.5:
                valid = torch.ones(batch, 1, tokens, dtype=torch.bool, device=self.device)
                valid[:, :, : chance.choice((0, 5, tokens - window - 1))] = False
            options = {"statistic": chance.choice(("mean", "rms")), "group_reduce": chance.choice(("mean", "max"))}
            sinks = torch.randn(heads * groups, device=self.device) if chance.random() < 0.4 else None
            logits = LogitOptions(size**-0.5, chance.choice((None, 5.0)), sinks)
            stores.poison()
            found = dispatch.window_attention(self.backend, query, key, valid, logits, **options)
            exact = score_reference.window_attention(query.float(), key.float(), valid, logits, **options).double()
            error = ((found.double() - exact).norm() / (exact.norm() + 1e-9)).item()
            # A CPU multiplies bfloat16 by bfloat16.
            bound = 2e-5 if dtype == torch.float32 or self.device.type == "cuda" else 1e-2
            what = f"window_attention {dtype} D{size} W{window} N{tokens}: error {error:.2e}"
            self.verdict(what, bool(found.isfinite().all()) and error < bound)

    def other_stream(self) -> None:
        """Work queued on a side stream is seen by an operation called there."""
        stream = torch.cuda.Stream(self.device)
        store = self.stores.make(64, 64, [3000, 5000], torch.bfloat16)
        query, zeros = self.stores.strided(1, 1, 8, 64, torch.bfloat16), torch.zeros_like(store.value)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            store.value.copy_(zeros)
            found = dispatch.attend(self.backend, query, store, LogitOptions(0.1), max_length=5000, stride=None)
        stream.synchronize()
        self.verdict("attend on the current stream", not found.any().item())


def held(store: RaggedBuffers) -> tuple[torch.Tensor, ...]:
    """The rows that sequences own, and the lengths."""
    rows = reference.flat_rows(store.starts, store.lengths, int(store.lengths.sum()))
    return (*(part[rows] for part in store.rows), store.lengths)


def zeroed(outputs: Iterable[torch.Tensor], counts: torch.Tensor, groups: int) -> list[torch.Tensor]:
    """Zeros for sequences without rows: what a softmax over nothing gives is torch's own affair."""
    return [
        out.masked_fill((counts == 0).view(out.shape[0], 1, -1).repeat_interleave(groups, dim=2).unsqueeze(-1), 0.0)
        for out in outputs
    ]
