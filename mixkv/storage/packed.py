"""PackedStore: selected rows in 4 bits, which never change, and beside them the window and what came later in 8 bits."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import row_access
from ..ops.arguments import LogitOptions, Packed
from ..ops.row_codes import rotated, rotated_back
from ..selection.ranking import Selection
from .ragged import RaggedStore

# Of tensors in files: those of the rows in 4 bits.
_PREFIX = "packed_"


class PackedStore:
    """A `RaggedStore` of two: the first rows of every sequence are ``selected``, the others ``recent``.

    All rows are stored rotated (`mixkv.ops.row_codes.rotated`), so that one rotated query serves both. What comes in and what goes
    out is not rotated.
    """

    even, stride = False, None

    def __init__(self, selected: RaggedStore, recent: RaggedStore, dtype: torch.dtype):
        self.selected, self.recent, self.dtype = selected, recent, dtype

    @classmethod
    def from_selection(cls, key: torch.Tensor, value: torch.Tensor, selection: Selection, backend: str = "auto") -> PackedStore:
        """As `RaggedStore.from_selection`: candidates in 4 bits, the observation window in 8."""
        positions, late = selection.flat_positions, selection.flat_ranks < 0
        # Late rows up to the end of each sequence.
        passed = torch.nn.functional.pad(late.cumsum(0), (1, 0))[selection.lengths.flatten().cumsum(0)]
        recent = passed.diff(prepend=passed.new_zeros(1)).view_as(selection.lengths)
        options: dict[str, Any] = {"backend": backend, "dtype": torch.float32, "codes": True, "rotate": True}
        selected = selection.lengths - recent
        return cls(
            RaggedStore.gathered(key, value, positions[~late], selected, **options, pack=True),
            RaggedStore.gathered(key, value, positions[late], recent, **options),
            key.dtype,
        )

    @classmethod
    def from_state(
        cls, tensors: dict[str, torch.Tensor], numbers: dict[str, Any], backend: str, dtype: torch.dtype
    ) -> PackedStore:
        """The inverse of `state`."""
        mine = {name.removeprefix(_PREFIX): part for name, part in tensors.items() if name.startswith(_PREFIX)}
        others = {"tail": 0, "bound": numbers["packed_bound"]}
        selected = RaggedStore.from_state(mine, others, backend, torch.float32)
        return cls(selected, RaggedStore.from_state(tensors, numbers, backend, torch.float32), dtype)

    @classmethod
    def joined(cls, stores: list[PackedStore]) -> PackedStore:
        """Copies of several stores as one of their batch rows."""
        selected = RaggedStore.joined([store.selected for store in stores])
        return cls(selected, RaggedStore.joined([store.recent for store in stores]), stores[0].dtype)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As `RaggedStore.state`; of selected rows under names of their own."""
        tensors, numbers = self.recent.state()
        others, bounds = self.selected.state()
        return tensors | {_PREFIX + name: part for name, part in others.items()}, {**numbers, "packed_bound": bounds["bound"]}

    @property
    def batch(self) -> int:
        return self.recent.batch

    @property
    def heads(self) -> int:
        return self.recent.heads

    @property
    def backend(self) -> str:
        return self.recent.backend

    @property
    def key(self) -> torch.Tensor:
        """Codes of recent rows [rows, D], spare rows included."""
        return self.recent.key

    @property
    def value(self) -> torch.Tensor:
        return self.recent.value

    @property
    def lengths(self) -> torch.Tensor:
        """int32 [B * Hkv], the rows of each sequence."""
        return self.selected.lengths + self.recent.lengths

    @property
    def row_totals(self) -> list[int]:
        return [sum(pair) for pair in zip(self.selected.row_totals, self.recent.row_totals)]

    @property
    def max_length(self) -> int:
        return self.selected.max_length + self.recent.max_length

    @property
    def tail(self) -> int:
        return self.recent.tail

    @property
    def spare_rows(self) -> int:
        return self.selected.spare_rows + self.recent.spare_rows

    @property
    def total(self) -> int:
        return self.selected.total + self.recent.total

    @property
    def nbytes(self) -> int:
        return self.selected.nbytes + self.recent.nbytes

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """As `RaggedStore.bytes_by_kind`, of rows in 4 bits and in 8."""
        recent = self.recent.bytes_by_kind
        return {kind: number + recent[kind] for kind, number in self.selected.bytes_by_kind.items()}

    def append(self, key: torch.Tensor, value: torch.Tensor, position: int, valid: torch.Tensor | None = None) -> None:
        self.recent.append(rotated(key.detach().float()), rotated(value.detach().float()), position, valid)

    def append_attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: int, logits: LogitOptions
    ) -> torch.Tensor:
        return self.recent.append_attend(query, key, value, position, logits, packed=self._packed, rotate=True)

    def attend(self, query: torch.Tensor, logits: LogitOptions) -> torch.Tensor:
        output = self.recent.attend(rotated(query.detach().float()), logits, packed=self._packed)
        return rotated_back(output).to(query.dtype)

    def attend_extend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        logits: LogitOptions,
        *,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        turned, key, value = (rotated(part.detach().float()) for part in (query, key, value))
        output = self.recent.attend_extend(turned, key, value, logits, mask=mask, packed=self._packed)
        return rotated_back(output).to(query.dtype)

    @property
    def _packed(self) -> Packed:
        return Packed(self.selected.buffers, self.selected.max_length)

    def check_crop(self, count: int) -> None:
        self.recent.check_crop(count)

    def crop(self, count: int) -> None:
        self.recent.crop(count)

    def take_rows(self, rows: list[int]) -> None:
        self.selected.take_rows(rows)
        self.recent.take_rows(rows)

    def evict(self, ranks: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        """As `RaggedStore.evict`, of rows in 4 bits and in 8."""
        quota = quota.to(ranks.device)
        held = self.selected.lengths.long()
        both = held + self.recent.lengths.long() - self.tail
        sequence = torch.arange(both.numel(), device=both.device).repeat_interleave(both, output_size=ranks.numel())
        place = torch.arange(ranks.numel(), device=both.device) - (both.cumsum(0) - both)[sequence]
        packed = place < held[sequence]
        self.selected.evict(ranks[packed], quota)
        others = ranks[~packed]
        # After a prompt these are the window, which stays.
        if (others >= 0).any():
            self.recent.evict(others, quota)
        return ranks[ranks < quota[sequence]]

    def keep(self, selection: Selection, padded_length: int) -> None:
        """As `RaggedStore.keep`; rows stay in the bits that they have."""
        counts = selection.lengths.flatten()
        sequence = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
        before = padded_length - self.lengths.long()
        # The place of each row among its sequence's, selected ones first.
        place, held = selection.flat_positions - before[sequence], self.selected.lengths.long()
        for store, mine, first in (
            (self.selected, place < held[sequence], torch.zeros_like(held)),
            (self.recent, place >= held[sequence], held),
        ):
            rows = (store.buffers.starts.long() - first)[sequence[mine]] + place[mine]
            numbers = torch.bincount(sequence[mine], minlength=counts.numel())
            store.keep_rows(rows, numbers.view(self.batch, self.heads))

    def padded(self, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index, valid = self._padded_index(self.max_length if length is None else length)
        parts = []
        for store in (self.selected, self.recent):
            rows = row_access.flat_rows(store.buffers.starts, store.lengths, store.total)
            parts.append(row_access.read_rows(store.buffers, rows))
        key, value = (rotated_back(torch.cat(part)[index]).to(self.dtype) for part in zip(*parts))
        return key, value, valid

    def padded_positions(self, length: int | None = None) -> torch.Tensor:
        index, valid = self._padded_index(self.max_length if length is None else length)
        position = torch.cat([store.held()[2] for store in (self.selected, self.recent)])
        return position[index].masked_fill(~valid, -1)

    def replace_values(self, value: torch.Tensor, heads: torch.Tensor) -> None:
        index, valid = self._padded_index(value.shape[2])
        changed = valid & heads.unsqueeze(-1)
        index, value = index[changed], rotated(value[changed].float())
        first = 0
        for store in (self.selected, self.recent):
            mine = (index >= first) & (index < first + store.total)
            rows = row_access.flat_rows(store.buffers.starts, store.lengths, store.total)
            row_access.write_values(store.buffers, rows[index[mine] - first], value[mine])
            first += store.total

    def positions(self) -> list[list[torch.Tensor]]:
        pairs = zip(self.selected.positions(), self.recent.positions())
        return [[torch.cat(parts) for parts in zip(*rows)] for rows in pairs]

    def _padded_index(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For sequences aligned to the right, int64 [B, Hkv, length]: each row's number among all selected and then all recent
        rows, 0 before a sequence begins; and bool, which places have a row."""
        selected, recent = self.selected.lengths.long(), self.recent.lengths.long()
        place = torch.arange(length, device=selected.device) - (length - selected - recent).unsqueeze(-1)
        within = place < selected.unsqueeze(-1)
        first, later = (held.cumsum(0) - held for held in (selected, recent))
        later = later + self.selected.total - selected
        index = place + torch.where(within, first.unsqueeze(-1), later.unsqueeze(-1))
        shape = (self.batch, self.heads, length)
        return index.masked_fill(place < 0, 0).view(shape), (place >= 0).view(shape)


# What a layer's rows are held in.
Store = RaggedStore | PackedStore


def joined(stores: list) -> Store:
    """Copies of several stores of one kind as one of their batch rows."""
    return type(stores[0]).joined(stores)
