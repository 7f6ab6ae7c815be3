"""Arena: one set of buffers for the rows of several layers, of a size that does not depend on what each of them holds.

A compiled decode step meets the same tensors at the same addresses for every prompt: `Region` has those of one layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..hf.attention import MARK
from ..ops import dispatch
from ..ops import step as decode_step
from ..ops.arguments import FixedRoom, LogitOptions, RaggedBuffers
from ..ops.layout import empty_buffers
from ..ops.sequence_rows import starts_changed
from .counted import Counted, CountsSteps, Steps
from .ragged import RaggedStore


class Kind(NamedTuple):
    """Which stores may share an arena; ``dtype``: of their rows."""

    device: torch.device
    dtype: torch.dtype
    size: int
    value_size: int
    backend: str

    @classmethod
    def of(cls, store: RaggedStore) -> Kind:
        key, value = store.key, store.value
        return cls(key.device, key.dtype, key.shape[1], value.shape[1], store.backend)


class Region:
    """The sequences of one layer in an arena, and a decode step over them.

    Attributes:
        buffers: key, value and position of the whole arena, and where the layer's sequences lie in it.
        room: where their room ends, and how many tokens they have evicted.
        max_length: at least the longest sequence, room included; the same for every prompt as far as that is possible.
        queries: [B, Hq, n, D], the last ones, where they are kept; else None.
    """

    is_step = True

    def __init__(self, arena: RaggedBuffers, sequences: int, backend: str):
        device = arena.key.device
        starts, lengths, ends, evicted = (torch.zeros(sequences, dtype=torch.int32, device=device) for _ in range(4))
        self.buffers = arena._replace(starts=starts, lengths=lengths)
        self.room, self.backend = FixedRoom(ends, evicted), backend
        self.max_length = 0
        self.queries: torch.Tensor | None = None
        for tensor in (*self.buffers.rows, starts, lengths, *self.room):
            torch._dynamo.mark_static_address(tensor)

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Marks the new key for the attention function, which calls `step`."""
        key = key.view_as(key)
        setattr(key, MARK, self)
        return key, value

    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: LogitOptions) -> torch.Tensor:
        """`mixkv.ops.step.reference` over the layer: query [B, Hq, 1, D] to [B, 1, Hq, Dv]."""
        if self.queries is not None:
            self.queries.copy_(torch.cat([self.queries[:, :, 1:], query], dim=2))
        options = {"max_length": self.max_length}
        return decode_step.step(self.backend, query, self.buffers, self.room, key, value, logits, **options)

    def keep_queries(self, queries: torch.Tensor | None) -> None:
        """From now on steps keep as many of the last queries as ``queries`` has, beginning with those."""
        held = self.queries
        if queries is None or held is None or held.shape != queries.shape or held.dtype != queries.dtype:
            self.queries = None if queries is None else queries.clone()
            if self.queries is not None:
                torch._dynamo.mark_static_address(self.queries)
        else:
            held.copy_(queries)

    def tokens_seen(self) -> torch.Tensor:
        """int64, one element: the tokens that each sequence has seen, which is the same number for all."""
        return (self.buffers.lengths[0] + self.room.evicted[0]).long()


class Arena:
    """Buffers of ``rows`` rows.

    Attributes:
        kind: of the stores that may lie here.
        buffers: the rows; no sequence.
    """

    def __init__(self, kind: Kind, rows: int):
        none = torch.zeros(0, dtype=torch.int32, device=kind.device)
        like = tuple(none.new_zeros(1, size, dtype=kind.dtype) for size in (kind.size, kind.value_size))
        self.kind, self.buffers = kind, empty_buffers(none, rows, 1, like)
        self._regions: dict[tuple[int, ...], list[Region]] = {}
        decode_step.prepare()

    @property
    def rows(self) -> int:
        return self.buffers.key.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.buffers.rows)

    def regions(self, sequences: tuple[int, ...]) -> list[Region]:
        """Those of layers with so many sequences each; the same objects whenever the numbers are the same."""
        if sequences not in self._regions:
            self._regions[sequences] = [Region(self.buffers, count, self.kind.backend) for count in sequences]
        return self._regions[sequences]

    def take(self, stores: list[RaggedStore], steps: Steps) -> list[ArenaStore]:
        """Copies the rows of ``stores``, which lie elsewhere, one store behind the other; ``steps`` will change them."""
        counts = tuple(store.lengths.numel() for store in stores)
        spare = (self.rows - sum(store.total for store in stores)) // sum(counts)
        if self.kind.backend != "native":
            # Plain torch reads rows that it masks: there must be no NaN of an earlier prompt.
            for part in self.buffers.rows:
                part.zero_()
        longest = _power_of_two(max(store.max_length for store in stores) + spare)
        if self.kind.backend == "native" and self.kind.device.type == "cpu":
            longest = self.rows // sum(counts)  # not used there
        taken, first = [], 0
        for region, store, count in zip(self.regions(counts), stores, counts):
            starts, lengths = region.buffers.starts, region.buffers.lengths
            lengths.copy_(store.lengths)
            shift = torch.arange(first, first + spare * count, spare, dtype=torch.int32, device=lengths.device)
            starts.copy_(lengths.cumsum(0, dtype=torch.int32).sub_(lengths).add_(shift))
            starts_changed(starts)
            torch.add(starts, lengths, out=region.room.ends).add_(spare)
            region.max_length = max(region.max_length, longest)
            dispatch.move_rows(self.kind.backend, region.buffers, store.buffers, total=store.total, max_length=store.max_length)
            taken.append(ArenaStore(store, region, spare, self.nbytes // len(stores), steps))
            first += store.total + spare * count
        return taken

    @staticmethod
    def rows_for(least: int) -> int:
        """A size of at least so many rows that few different prompts need another."""
        step = max(256, _power_of_two(least) // 16)
        return -(-least // step) * step


class ArenaStore(CountsSteps, RaggedStore):
    """A `RaggedStore` whose rows lie in an arena, until an operation needs other buffers.

    Attributes:
        region: its rows in the arena.
    """

    row_totals, max_length, spare, tail = Counted(), Counted(), Counted(), Counted()

    def __init__(self, store: RaggedStore, region: Region, spare: int, nbytes: int, steps: Steps):
        super().__init__(store.batch, store.heads, store.backend, store.dtype)
        self.region, self.buffers, self._share = region, region.buffers, nbytes
        self.row_totals, self.max_length, self.tail = list(store.row_totals), store.max_length, store.tail
        self.spare, self.even = spare, False
        self.follow(steps)

    @property
    def in_arena(self) -> bool:
        return self.buffers is self.region.buffers

    @property
    def nbytes(self) -> int:
        """Bytes held; in the arena, an equal share of it."""
        if not self.in_arena:
            return super().nbytes
        return self._share + sum(part.untyped_storage().nbytes() for part in self._bookkeeping)

    @property
    def _bookkeeping(self) -> list[torch.Tensor]:
        return [*super()._bookkeeping, *(self.region.room if self.in_arena else ())]

    @property
    def spare_rows(self) -> int:
        return self.spare * self.lengths.numel() if self.in_arena else super().spare_rows

    def count_evicted(self, seen: int) -> None:
        """Tells the device how many of the ``seen`` tokens each sequence does not hold."""
        torch.sub(torch.full_like(self.lengths, seen), self.lengths, out=self.region.room.evicted)

    def detached(self) -> RaggedStore:
        """A copy in buffers of its own."""
        lengths = self.lengths.view(self.batch, self.heads)
        options = {"dtype": self.dtype, "tail": self.tail, "bound": self.max_length}
        return RaggedStore.from_rows(self.held(), lengths, self.backend, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detached().__reduce_ex__(protocol)

    def _add_steps(self, new: int) -> None:
        held = self.__dict__
        held["row_totals"] = [total + self.heads * new for total in held["row_totals"]]
        held["max_length"] += new
        held["tail"] += new
        held["spare"] -= new


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()
