"""RaggedStore: the kept rows of one layer, a different number for each KV head, in flat buffers with spare rows."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import dispatch, row_access
from ..ops.arguments import LogitOptions, Packed, RaggedBuffers
from ..ops.layout import empty_buffers, spare_per_sequence
from ..ops.row_codes import dequantised, quantised
from ..selection.ranking import Selection
from .ragged_layout import RaggedLayout

# Names in files of what `RaggedStore.held` returns.
_ROWS = ("key", "value", "position", "key_scale", "value_scale")


def _sizes(key: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
    """Head sizes of buffers; codes of uint8 are two to a byte."""
    each = 2 if key.dtype == torch.uint8 else 1
    return each * key.shape[1], each * value.shape[1]


class RaggedStore(RaggedLayout):
    """Keys, values and positions of B x Hkv sequences, to which rows are appended and from which they are evicted."""

    def __init__(self, batch: int, heads: int, backend: str, dtype: torch.dtype):
        self.batch, self.heads, self.backend, self.dtype = batch, heads, backend, dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        # mixkv 0.1.0 pickled the buffers one by one.
        if "buffers" not in state:
            state["buffers"] = RaggedBuffers(*(state.pop(name) for name in RaggedBuffers._fields[:5]))
        state.setdefault("dtype", state["buffers"].key.dtype)
        self.__dict__.update(state)
        # Where it was pickled there may have been another back end than here.
        key, value = self.key, self.value
        self.backend = dispatch.choose_again(self.backend, key.device, self.dtype, *_sizes(key, value), codes=self.coded)

    @classmethod
    def from_selection(
        cls, key: torch.Tensor, value: torch.Tensor, selection: Selection, backend: str = "auto", *, codes: bool = False
    ) -> RaggedStore:
        """Copies the selected rows of ``key`` [B, Hkv, N, D] and ``value`` [B, Hkv, N, Dv] into new buffers.

        Args:
            backend: a name from `mixkv.registry.BACKENDS`.
            codes: rows are stored in int8, those appended later too.
        """
        return cls.gathered(key, value, selection.flat_positions, selection.lengths, backend, codes=codes)

    @classmethod
    def gathered(
        cls,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        counts: torch.Tensor,
        backend: str = "auto",
        *,
        dtype: torch.dtype | None = None,
        codes: bool = False,
        **format: bool,
    ) -> RaggedStore:
        """`from_selection` of ``counts`` int64 [B, Hkv] rows each, at ``positions`` int32 [rows].

        Args:
            dtype: of queries and of new rows; None: that of ``key``.
            codes, format: how rows are stored, see `selection_reference.gather`.
        """
        key, value, dtype = key.detach(), value.detach(), dtype or key.dtype
        chosen = dispatch.choose(backend, key.device, dtype, key.shape[3], value.shape[3], codes=codes)
        store = cls(key.shape[0], key.shape[1], chosen, dtype)
        store.buffers = dispatch.gather(chosen, key, value, positions, counts, codes=codes, **format)
        store._measure(counts.tolist())
        store.spare, store.tail = store.spare_rows // store.lengths.numel(), 0
        return store

    @classmethod
    def from_rows(
        cls,
        rows: tuple[torch.Tensor, ...],
        lengths: torch.Tensor,
        backend: str = "auto",
        *,
        dtype: torch.dtype | None = None,
        tail: int = 0,
        bound: int | None = None,
    ) -> RaggedStore:
        """The inverse of `held`: copies ``rows`` into new buffers.

        Args:
            rows: as `held` returns them, sequence after sequence.
            lengths: int32 [B, Hkv], on the rows' device; its sum is the number of rows.
            backend: a name from `mixkv.registry.BACKENDS`.
            dtype: the model's; None: that of the rows.
            tail: as the former store had it.
            bound: the former store's ``max_length`` if it was not ``even``: with it attention sums in the same order as there.
        """
        key, value, dtype = rows[0], rows[1], dtype or rows[0].dtype
        chosen = dispatch.choose(backend, key.device, dtype, *_sizes(key, value), codes=len(rows) > 3)
        store = cls(lengths.shape[0], lengths.shape[1], chosen, dtype)
        store._measure(lengths.tolist())
        store.spare = spare_per_sequence(store.total, lengths.numel())
        store.buffers = empty_buffers(lengths.flatten(), store.total, store.spare, rows)
        store.tail = tail
        if bound is not None:
            store.max_length, store.even = max(store.max_length, bound), False
        order = row_access.flat_rows(store.buffers.starts, store.lengths, store.total)
        for buffer, part in zip(store.buffers.rows, rows):
            buffer.index_copy_(0, order, part)
        return store

    @classmethod
    def from_state(
        cls, tensors: dict[str, torch.Tensor], numbers: dict[str, Any], backend: str, dtype: torch.dtype
    ) -> RaggedStore:
        """The inverse of `state`, for a model of ``dtype``."""
        rows = tuple(tensors[name] for name in _ROWS if name in tensors)
        tail, bound = numbers["tail"], numbers["bound"]
        return cls.from_rows(rows, tensors["lengths"], backend, dtype=dtype, tail=tail, bound=bound)

    @classmethod
    def joined(cls, stores: list[RaggedStore]) -> RaggedStore:
        """Copies of several stores as one of their batch rows."""
        rows = tuple(torch.cat(part) for part in zip(*(store.held() for store in stores)))
        lengths = torch.cat([store.lengths.view(store.batch, -1) for store in stores])
        return cls.from_rows(rows, lengths, stores[0].backend, dtype=stores[0].dtype)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors, copies of the rows held, and numbers for `from_state`."""
        tensors = dict(zip(_ROWS, self.held())) | {"lengths": self.lengths.view(self.batch, self.heads)}
        return tensors, {"tail": self.tail, "bound": None if self.even else self.max_length}

    def held(self) -> tuple[torch.Tensor, ...]:
        """Copies of the rows held, without spare ones, sequence after sequence.

        Returns: key [rows, D], value [rows, Dv], position int32 [rows], and for rows in int8 key_scale and value_scale [rows].
        """
        rows = row_access.flat_rows(self.buffers.starts, self.lengths, self.total)
        return tuple(part[rows] for part in self.buffers.rows)

    def as_stored(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` [..., D] as they are read once they have been stored, in their dtype."""
        return dequantised(*quantised(rows), rows.dtype) if self.coded else rows

    def append(self, key: torch.Tensor, value: torch.Tensor, position: int, valid: torch.Tensor | None = None) -> None:
        """Adds n rows ``key`` [B, Hkv, n, D], ``value`` [B, Hkv, n, Dv] of positions ``position ..`` to every sequence, in place.

        ``valid`` [B, n] leaves out padding; then the new lengths are read back to the host.
        """
        self._reserve(key.shape[2])
        dispatch.append(self.backend, self.buffers, key.detach(), value.detach(), position, valid)
        if valid is None:
            self._count(key.shape[2])
            return
        self.spare -= key.shape[2]
        self._measure(self.lengths.view(self.batch, self.heads).tolist())
        self.even, self.tail = False, 0

    def append_attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position: int,
        logits: LogitOptions,
        *,
        packed: Packed | None = None,
        rotate: bool = False,
    ) -> torch.Tensor:
        """A decode step: `append` of one row ``key`` [B, Hkv, 1, D] and `attend` of ``query`` [B, Hq, 1, D]."""
        self._reserve(1)
        output = dispatch.append_attend(
            self.backend,
            query.detach(),
            self.buffers,
            key.detach(),
            value.detach(),
            position,
            logits,
            max_length=self.max_length + 1,
            stride=self.stride,
            packed=packed,
            rotate=rotate,
        )
        self._count(1)
        return output

    def crop(self, count: int) -> None:
        """Removes the last ``count`` rows of every sequence.

        Raises:
            ValueError: that reaches beyond what was appended since the last compression, whose other rows are gone.
        """
        self.check_crop(count)
        self.lengths.sub_(count)
        self.spare += count
        self.max_length -= count
        self.tail -= count
        self.row_totals = [total - self.heads * count for total in self.row_totals]

    def check_crop(self, count: int) -> None:
        """Raises the ValueError of `crop`."""
        if count > self.tail:
            raise ValueError(
                f"cannot crop {count} tokens: only the {self.tail} appended since the last compression can be taken back. Start "
                f"from a copy made earlier (copy.deepcopy(cache))"
            )

    def take_rows(self, rows: list[int]) -> None:
        """Makes batch row i a copy of former batch row ``rows[i]``; rows may repeat or be left out (beam search)."""
        if rows == list(range(self.batch)):
            return
        index = torch.tensor(rows, device=self.lengths.device)
        starts, lengths = (part.view(self.batch, self.heads)[index].flatten() for part in (self.buffers.starts, self.lengths))
        self._move(starts, lengths, [self.row_totals[row] for row in rows])

    def keep(self, selection: Selection, padded_length: int) -> None:
        """Keeps only a `selection` made over `padded` of that length."""
        counts = selection.lengths.flatten()
        first = (self.buffers.starts + self.lengths).long() - padded_length
        rows = first.repeat_interleave(counts) + selection.flat_positions
        self.keep_rows(rows, selection.lengths)

    def evict(self, ranks: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        """Evicts the selected rows whose rank is not below their sequence's quota; rows appended since then stay.

        Args:
            ranks: int32 [selected rows], `Selection.flat_ranks` of the rows held.
            quota: int64 [S].

        Returns: the ranks of the selected rows that stay.
        """
        self.buffers, left = dispatch.evict(self.backend, self.buffers, ranks, quota.to(ranks.device), self.tail)
        self._measure(self.lengths.view(self.batch, self.heads).tolist())
        self.spare = self.spare_rows // self.lengths.numel()
        return left

    def replace_values(self, value: torch.Tensor, heads: torch.Tensor) -> None:
        """Gives the rows the values [B, Hkv, N, Dv], in the order of `padded`, of the sequences that ``heads`` bool [B, Hkv] names."""
        rows, valid = self._padded_rows(value.shape[2])
        changed = valid & heads.unsqueeze(-1)
        row_access.write_values(self.buffers, rows[changed], value[changed])

    def attend(self, query: torch.Tensor, logits: LogitOptions, *, packed: Packed | None = None) -> torch.Tensor:
        """`reference.attend` over the store: ``query`` [B, Hq, 1, D] to [B, 1, Hq, Dv]."""
        return dispatch.attend(self.backend, query.detach(), self.buffers, logits, packed=packed, **self._extent)

    def attend_extend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        logits: LogitOptions,
        *,
        mask: torch.Tensor | None = None,
        packed: Packed | None = None,
    ) -> torch.Tensor:
        """`reference.attend_extend` over the store and a new block: ``query`` [B, Hq, n, D] to [B, n, Hq, Dv].

        The block is seen as it will be stored: the same as one token after another would see.
        """
        key, value = (self.as_stored(part.detach()) for part in (key, value))
        options = {"mask": mask, "packed": packed, **self._extent}
        return dispatch.attend_extend(self.backend, query.detach(), self.buffers, key, value, logits, **options)

    def _reserve(self, new: int) -> None:
        if new > self.spare:
            self._move(self.buffers.starts, self.lengths, self.row_totals, new)

    def _move(self, starts: torch.Tensor, lengths: torch.Tensor, row_totals: list[int], new: int = 0) -> None:
        """Copies the rows that ``starts``, ``lengths`` name in the present buffers into new ones."""
        total = sum(row_totals)
        spare = spare_per_sequence(total, lengths.numel(), new)
        buffers = empty_buffers(lengths, total, spare, self.buffers.rows)
        source = self.buffers._replace(starts=starts)
        dispatch.move_rows(self.backend, buffers, source, total=total, max_length=self.max_length)
        self.buffers, self.spare, self.row_totals, self.batch = buffers, spare, row_totals, len(row_totals)

    def keep_rows(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Keeps buffer rows ``rows`` int64, sequence after sequence, ``counts`` [B, Hkv] of each."""
        former = self.buffers
        self._measure(counts.tolist())
        self.spare, self.tail = spare_per_sequence(self.total, counts.numel()), 0
        self.buffers = empty_buffers(counts.flatten(), self.total, self.spare, former.rows)
        to_rows = row_access.flat_rows(self.buffers.starts, self.lengths, self.total)
        for buffer, part in zip(self.buffers.rows, former.rows):
            buffer.index_copy_(0, to_rows, part.index_select(0, rows))
