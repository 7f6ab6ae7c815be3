"""ChunkStore: all rows of a layer's dynamic heads in chunks, outside the resident rows, and the few that a step attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..ops import dispatch, row_access
from ..ops.arguments import ChosenChunks, LogitOptions
from ..selection.hybrid import Plan
from . import chunk_bounds
from .chunk_pool import Pool
from .chunk_slots import Slots
from .ragged import RaggedStore

# Rows of keys that a block of queries may read at once, each query its own.
_READ_ROWS = 1 << 20
_LAYOUT = ("starts", "rows", "bound_starts", "counts", "slots", "first_positions")


def _heads(rows: torch.Tensor) -> list[torch.Tensor]:
    """[B, Hkv, N, D] as views [N, D], head by head."""
    return [head for row in rows.detach().unbind() for head in row.unbind()]


class ChunkStore:
    """The chunks of B x Hkv sequences; those of static heads have none.

    Attributes:
        pool: all rows, sequence after sequence, in the host's memory (pinned) where the model is on a GPU and they are to be
            offloaded, else where the model is.
        chunk: rows of a chunk; a sequence's last may have fewer.
        codes, grid: `chunk_bounds.of_chunks` of all chunks, where the model is.
        starts, rows: int32 [S], each sequence's first row in the pool and how many it has there. Sequences may share rows.
        bound_starts, counts: int32 [S], its first chunk and how many it has.
        slots: int32 [S], how many of them a step attends to.
        first_positions: int32 [S], the position of its first row's token.
        cached: on a GPU, the chunks that have been fetched from the host's memory; else None.
        steps: query positions so far, and chosen, reused: chunks that they chose, and those among them that the position before
            had chosen too (all sequences together; ``chosen`` on the host, ``reused`` an int64 tensor).
    """

    starts: torch.Tensor
    rows: torch.Tensor
    bound_starts: torch.Tensor
    counts: torch.Tensor
    slots: torch.Tensor
    first_positions: torch.Tensor
    last: torch.Tensor

    def __init__(
        self,
        backend: str,
        pool: Pool,
        chunk: int,
        bounds: tuple[torch.Tensor, torch.Tensor],
        layout: dict[str, torch.Tensor],
        batch: int,
    ):
        self.backend, self.pool, self.chunk, self.batch = backend, pool, chunk, batch
        self.codes, self.grid = bounds
        for name in _LAYOUT:
            setattr(self, name, layout[name])
        self.steps = self.chosen = 0
        self.reused = torch.zeros((), dtype=torch.int64, device=self.codes.device)
        self.cached: Slots | None = None
        self._measure()
        if pool.key.device != self.codes.device:
            self.fetch_to_slots()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # mixkv 0.1.0 pickled them by another name.
        if "columns" in state:
            state["first_positions"] = state.pop("columns")
        self.__dict__.update(state)
        # Where it was pickled there may have been another back end than here.
        key, value = self.pool.key, self.pool.value
        self.backend = dispatch.choose_again(self.backend, self.codes.device, key.dtype, key.shape[1], value.shape[1])

    @classmethod
    def from_plan(
        cls, key: torch.Tensor, value: torch.Tensor, plan: Plan, backend: str = "auto", *, offload: bool = True
    ) -> ChunkStore | None:
        """Copies what ``plan`` puts in chunks of ``key`` [B, Hkv, N, D], ``value`` [B, Hkv, N, Dv]; None if that is nothing."""
        if not plan.dynamic.any():
            return None
        rows = plan.chunked.flatten()
        spans = torch.stack([plan.first_chunked.flatten(), rows], dim=1).tolist()
        keys, values = (
            torch.cat([head[first : first + count] for head, (first, count) in zip(_heads(part), spans)])
            for part in (key, value)
        )
        first, slots = plan.first_chunked.flatten(), plan.slots.flatten()
        return cls.from_rows(keys, values, rows, first, slots, key.shape[0], backend, chunk=plan.chunk, offload=offload)

    @classmethod
    def from_rows(
        cls,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor,
        first_positions: torch.Tensor,
        slots: torch.Tensor,
        batch: int,
        backend: str = "auto",
        *,
        chunk: int,
        offload: bool = True,
    ) -> ChunkStore:
        """Takes key [rows, D], value [rows, Dv], sequence after sequence; rows, first_positions, slots int [S]: see the attributes."""
        counts = (rows + chunk - 1) // chunk
        starts, bound_starts = rows.cumsum(0) - rows, counts.cumsum(0) - counts
        chunks = int(counts.sum())
        number = row_access.flat_rows(torch.zeros_like(counts), counts, chunks)
        sequence = torch.arange(rows.numel(), device=rows.device).repeat_interleave(counts, output_size=chunks)
        at = chunk * number
        lengths = (rows[sequence] - at).clamp(max=chunk)
        bounds = chunk_bounds.of_chunks(key, starts[sequence] + at, lengths, sequence, rows.numel(), chunk)
        layout = {
            "starts": starts,
            "rows": rows,
            "first_positions": first_positions,
            "bound_starts": bound_starts,
            "counts": counts,
            "slots": slots,
        }
        layout = {name: part.to(torch.int32, copy=True).contiguous() for name, part in layout.items()}
        backend = dispatch.choose(backend, key.device, key.dtype, key.shape[1], value.shape[1])
        if offload and key.is_cuda:
            key, value = (torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part) for part in (key, value))
        return cls(backend, Pool(key, value), chunk, bounds, layout, batch)

    @classmethod
    def joined(cls, stores: Sequence[ChunkStore | None], batches: Sequence[int]) -> ChunkStore | None:
        """The stores of several caches of one model, unused ones, as one of their batches' rows; None has no chunks.

        Raises:
            ValueError: their chunks have different numbers of rows.
        """
        some = next((store for store in stores if store is not None), None)
        if some is None:
            return None
        if any(store is not None and store.chunk != some.chunk for store in stores):
            raise ValueError("caches whose chunks have different numbers of rows (hybrid_chunk) do not make one batch")
        heads = some.starts.numel() // some.batch
        parts, rows, chunks = [], 0, 0
        for store, batch in zip(stores, batches):
            if store is None:
                none = some.starts.new_zeros(batch * heads)
                layout = dict.fromkeys(_LAYOUT, none)
                parts.append((layout, some.grid.new_zeros(batch * heads, *some.grid.shape[1:])))
                continue
            names = ("rows", "first_positions", "counts", "slots")
            layout = {name: getattr(store, name) for name in names}
            layout |= {"starts": store.starts + rows, "bound_starts": store.bound_starts + chunks}
            parts.append((layout, store.grid))
            rows, chunks = rows + store.pool.key.shape[0], chunks + store.codes.shape[0]
        held = [store for store in stores if store is not None]
        pool = Pool.joined([store.pool for store in held])
        layout = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
        bounds = (torch.cat([store.codes for store in held]), torch.cat([grid for _, grid in parts]))
        return cls(some.backend, pool, some.chunk, bounds, layout, sum(batches))

    def set_slots(self, slots: torch.Tensor) -> None:
        """From now on a step attends to ``slots`` int [S] chunks, no more than ``counts``; the counters start again."""
        self.slots = slots.to(self.slots)
        self._measure()
        if self.cached is not None:
            self.fetch_to_slots()

    def fetch_to_slots(self) -> None:
        """From now on attends to copies of chunks, which are fetched when they are chosen."""
        # Former slots are freed before there is room for new ones.
        self.cached = None
        self.cached = Slots(self.slots, self.most, self.longest, self.chunk, self.pool, self.codes.device)

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the rows in chunks, sequence after sequence: key [rows, D], value [rows, Dv]."""
        total = int(self.rows.sum())
        rows = row_access.flat_rows(self.starts, self.rows, total).to(self.pool.key.device)
        return self.pool.key[rows], self.pool.value[rows]

    def join(self, resident: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Adds the positions in chunks to ``resident`` [B][Hkv], ascending int32 positions."""
        spans = zip(self.first_positions.tolist(), self.rows.tolist())
        return [
            [
                torch.cat([held, torch.arange(first, first + rows).to(held)]).sort().values
                for held, (first, rows) in zip(row, spans)
            ]
            for row in resident
        ]

    @property
    def nbytes(self) -> int:
        """Bytes held, those outside included."""
        return sum(self.bytes_by_kind.values())

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """`nbytes` by what they are of: keys, values, bounds, copies of fetched chunks, bookkeeping."""
        ints = [getattr(self, name) for name in (*_LAYOUT, "last")]
        if self.cached:
            ints += [self.cached.chunk, self.cached.rows]
        copies = [self.cached.key, self.cached.value] if self.cached else []
        of_kind = {"keys": [self.pool.key], "values": [self.pool.value], "fetched": copies, "bookkeeping": ints}
        kinds = {kind: sum(part.untyped_storage().nbytes() for part in parts) for kind, parts in of_kind.items()}
        return kinds | {"bounds": self.bound_bytes}

    @property
    def bound_bytes(self) -> int:
        """Bytes of the bounds by which chunks are chosen."""
        return self.codes.untyped_storage().nbytes() + self.grid.untyped_storage().nbytes()

    @property
    def chunk_bytes(self) -> int:
        """Of a whole chunk's keys and values."""
        return self.chunk * (self.pool.key[:1].nbytes + self.pool.value[:1].nbytes)

    @property
    def moved(self) -> int:
        """Chunks that had to be fetched: chosen, and not by the position before."""
        return self.chosen - int(self.reused)

    def take_rows(self, rows: list[int]) -> None:
        """Makes batch row i a copy of former batch row ``rows[i]``; nothing in the pool is copied."""
        index = torch.tensor(rows, device=self.starts.device)
        for name in (*_LAYOUT, "last", "grid"):
            part = getattr(self, name)
            setattr(self, name, part.unflatten(0, (self.batch, -1))[index].flatten(0, 1))
        if self.cached is not None:
            self.cached.take_rows(index, self.batch, self.slots)
        self.batch = len(rows)
        self._count_slots()

    def attend(self, store: RaggedStore, query: torch.Tensor, lengths: torch.Tensor, logits: LogitOptions) -> torch.Tensor:
        """Attention over stored rows and the chunks that each query chooses.

        Args:
            store: the resident rows, with those of the new positions.
            query: [B, Hq, n, D].
            lengths: int32 [B, n, Hkv], the stored rows that a position sees.
            logits: as in the model.

        Returns: [B, n, Hq, Dv].
        """
        new = query.shape[2]
        if self.cached is not None:
            block = 1
        else:
            block = max(1, _READ_ROWS // (self.starts.numel() * (store.max_length + self.chunk * self.most)))
        query = query.detach().transpose(1, 2)
        if new <= block:
            return self._attend_block(store, query, lengths, logits)
        parts = [
            self._attend_block(store, query[:, first : first + block], lengths[:, first : first + block], logits)
            for first in range(0, new, block)
        ]
        return torch.cat(parts, dim=1)

    def choose(self, query: torch.Tensor) -> torch.Tensor:
        """The chunks for queries [B, n, Hq, D]: int64 [B, n, Hkv, most slots], -1 beyond a head's slots."""
        batch, new, query_heads, size = query.shape
        grid, starts, counts, slots = (
            self._each(part, new) for part in (self.grid, self.bound_starts, self.counts, self.slots)
        )
        folded = query.reshape(batch * new, query_heads, 1, size)
        scores = dispatch.chunk_scores(self.backend, folded, self.codes, grid, starts, counts, longest=self.longest)
        return chunk_bounds.choose(scores, slots, self.most).view(batch, new, -1, self.most)

    def _attend_block(
        self, store: RaggedStore, query: torch.Tensor, lengths: torch.Tensor, logits: LogitOptions
    ) -> torch.Tensor:
        batch, new, query_heads, size = query.shape
        chosen = self.choose(query)
        self._tally(chosen)
        chosen = chosen.flatten(0, 2)
        starts, rows = self._each(self.starts, new).unsqueeze(1), self._each(self.rows, new).unsqueeze(1)
        pool: Pool | Slots = self.pool
        blocks = starts + self.chunk * chosen
        block_rows = (rows - self.chunk * chosen).clamp(max=self.chunk).masked_fill(chosen < 0, 0)
        if self.cached is not None:
            blocks, block_rows = self.cached.fetch(self.backend, chosen, blocks, block_rows, self.pool)
            pool = self.cached
        out = dispatch.attend_chunks(
            self.backend,
            query.reshape(batch * new, query_heads, 1, size),
            store.buffers._replace(starts=self._each(store.buffers.starts, new), lengths=lengths.flatten()),
            ChosenChunks(pool.key, pool.value, blocks.to(torch.int32), block_rows.to(torch.int32), self.chunk),
            logits,
            max_length=store.max_length,
        )
        return out.view(batch, new, query_heads, -1)

    def _each(self, part: torch.Tensor, new: int) -> torch.Tensor:
        """A property of sequences [S, ...] repeated for ``new`` positions of each batch row: [B * new * Hkv, ...]."""
        if new == 1:
            return part
        each = part.view(self.batch, 1, -1, *part.shape[1:])
        return each.expand(-1, new, *each.shape[2:]).flatten(0, 2)

    def _tally(self, chosen: torch.Tensor) -> None:
        """Counts what positions [B, n, Hkv, most slots] chose."""
        batch, new, heads, _ = chosen.shape
        marks = chunk_bounds.marked(chosen, self.longest)
        before = torch.cat([self.last.view(batch, 1, heads, -1), marks[:, :-1]], dim=1) if new > 1 else self.last.view_as(marks)
        self.reused += (marks & before).sum()
        self.last = marks[:, -1].flatten(0, 1)
        self.steps += new
        self.chosen += new * self.in_slots

    def _measure(self) -> None:
        self.longest, self.most = int(self.counts.max()), int(self.slots.max())
        self.last = torch.zeros(self.starts.numel(), self.longest, dtype=torch.bool, device=self.codes.device)
        self._count_slots()

    def _count_slots(self) -> None:
        self.in_slots = int(self.slots.sum())
