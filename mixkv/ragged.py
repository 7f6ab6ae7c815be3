"""RaggedStore: the kept rows of one layer, a different number for each KV head, in flat buffers with spare rows."""

from __future__ import annotations

import torch

from . import kernels
from .selection import Selection, split_positions

# Spare rows a sequence gets whenever the buffers are laid out: a share of its mean length, and at least so many. A layout
# copies every row once, so a decode step copies at most 1 / share rows per sequence on average, however long it runs.
_SPARE_SHARE = 1 / 8
_SPARE_ROWS = 16


class RaggedStore:
    """Keys, values and positions of B x Hkv sequences.

    Attributes:
        key, value: flat buffers [rows, D], [rows, Dv].
        position: int32 [rows], the column of the sequence as passed that each row came from.
        starts, lengths: int32 [B * Hkv], where each sequence begins and how many rows it has.
        batch, heads: B and Hkv.
        row_totals: rows held per batch row (host).
        max_length: at least the longest sequence (host).
        spare: rows that every sequence can still take in place (host).
        tail: rows at the end of every sequence that `crop` may remove: those appended since the last selection (host).
    """

    def __init__(self, batch: int, heads: int):
        self.batch, self.heads = batch, heads

    @classmethod
    def from_selection(cls, key: torch.Tensor, value: torch.Tensor, selection: Selection) -> RaggedStore:
        """Copies the selected rows of ``key`` [B, Hkv, N, D] and ``value`` [B, Hkv, N, Dv] into new buffers."""
        store = cls(key.shape[0], key.shape[1])
        lengths = selection.lengths.flatten()
        row, head = (torch.arange(count, device=key.device) for count in key.shape[:2])
        total = selection.flat_positions.numel()
        row = row.repeat_interleave(key.shape[1]).repeat_interleave(lengths, output_size=total)
        head = head.repeat(key.shape[0]).repeat_interleave(lengths, output_size=total)
        column = selection.flat_positions.long()
        taken = (key.detach()[row, head, column], value.detach()[row, head, column], selection.flat_positions)
        store._lay_out(taken, lengths.to(torch.int32), selection.lengths.tolist())
        return store

    @property
    def nbytes(self) -> int:
        """Bytes held, spare rows and bookkeeping included."""
        tensors = (self.key, self.value, self.position, self.starts, self.lengths)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    @property
    def stride(self) -> int | None:
        """The common capacity where all sequences have the same length, so that the buffers are dense tensors; else None."""
        return self.max_length + self.spare if self.even else None

    @property
    def total(self) -> int:
        """Rows held by all sequences."""
        return sum(self.row_totals)

    def append(self, key: torch.Tensor, value: torch.Tensor, column: int, valid: torch.Tensor | None = None) -> None:
        """Adds n rows ``key`` [B, Hkv, n, D], ``value`` [B, Hkv, n, Dv] of columns ``column ..`` to every sequence, in place.

        ``valid`` [B, n] leaves out padding; then the new lengths are read back to the host.
        """
        new = key.shape[2]
        if new > self.spare:
            self._move(self.starts, self.lengths, new)
        kernels.append(self._buffers, self.starts, self.lengths, key.detach(), value.detach(), column, valid)
        self.spare -= new
        if valid is None:
            self.max_length += new
            self.tail += new
            self.row_totals = [total + self.heads * new for total in self.row_totals]
        else:
            self._measure(self.lengths.view(self.batch, self.heads).tolist())
            self.even, self.tail = False, 0

    def crop(self, count: int) -> None:
        """Removes the last ``count`` rows of every sequence.

        Raises:
            ValueError: that reaches beyond what was appended since the last compression, whose other rows are gone.
        """
        if count > self.tail:
            raise ValueError(
                f"cannot crop {count} tokens: only the {self.tail} appended since the last compression can be taken back. Start "
                f"from a copy made earlier (copy.deepcopy(cache))"
            )
        self.lengths.sub_(count)
        self.spare += count
        self.max_length -= count
        self.tail -= count
        self.row_totals = [total - self.heads * count for total in self.row_totals]

    def take_rows(self, rows: list[int]) -> None:
        """Makes batch row i a copy of former batch row ``rows[i]``; rows may repeat or be left out (beam search)."""
        if rows == list(range(self.batch)):
            return
        index = torch.tensor(rows, device=self.starts.device)
        starts, lengths = (part.view(self.batch, self.heads)[index].flatten() for part in (self.starts, self.lengths))
        self.batch = len(rows)
        self.row_totals = [self.row_totals[row] for row in rows]
        self._move(starts, lengths)

    def keep(self, selection: Selection, padded_length: int) -> None:
        """Keeps only a `selection` made over `padded` of that length."""
        counts = selection.lengths.flatten()
        lengths, starts = self.lengths.long(), self.starts.long()
        first = (starts + lengths - padded_length).repeat_interleave(counts)
        rows = first + selection.flat_positions
        taken = tuple(buffer[rows] for buffer in self._buffers)
        self._lay_out(taken, counts.to(torch.int32), selection.lengths.tolist())

    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All sequences aligned to the right: key [B, Hkv, N, D], value [B, Hkv, N, Dv], valid bool [B, Hkv, N]."""
        columns = torch.arange(-self.max_length, 0, device=self.starts.device)
        lengths = self.lengths.long().unsqueeze(1)
        rows = (self.starts.long().unsqueeze(1) + lengths + columns).clamp(min=0).flatten()
        shape = (self.batch, self.heads, self.max_length)
        valid = (columns >= -lengths).view(shape)
        return self.key[rows].view(*shape, -1), self.value[rows].view(*shape, -1), valid

    def positions(self) -> list[list[torch.Tensor]]:
        """[B][Hkv] ascending int32 columns held."""
        rows = kernels.flat_rows(self.starts, self.lengths, self.total)
        return split_positions(self.position[rows], self.lengths.view(self.batch, self.heads))

    def attend(self, query: torch.Tensor, **options) -> torch.Tensor:
        """`kernels.attend` over the store: ``query`` [B, Hq, 1, D] to [B, 1, Hq, Dv]."""
        return kernels.attend(
            query, self.key, self.value, self.starts, self.lengths, max_length=self.max_length, stride=self.stride, **options
        )

    def attend_extend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
        """`kernels.attend_extend` over the store and a new block: ``query`` [B, Hq, n, D] to [B, n, Hq, Dv]."""
        return kernels.attend_extend(
            query,
            self.key,
            self.value,
            self.starts,
            self.lengths,
            key,
            value,
            max_length=self.max_length,
            stride=self.stride,
            **options,
        )

    @property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.key, self.value, self.position

    def _move(self, starts: torch.Tensor, lengths: torch.Tensor, new: int = 0) -> None:
        """Lays out afresh the rows that ``starts``, ``lengths`` name in the present buffers."""
        tail = self.tail
        rows = kernels.flat_rows(starts, lengths, self.total)
        taken = tuple(buffer.index_select(0, rows) for buffer in self._buffers)
        self._lay_out(taken, lengths, None, new)
        self.tail = tail

    def _lay_out(
        self,
        taken: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        lengths: torch.Tensor,
        host_lengths: list[list[int]] | None,
        new: int = 0,
    ) -> None:
        """Puts rows (sequence after sequence) into new buffers with spare rows for ``new`` more and some."""
        if host_lengths is not None:
            self._measure(host_lengths)
        total = taken[0].shape[0]
        sequences = lengths.numel()
        self.spare = new + max(_SPARE_ROWS, int(total / sequences * _SPARE_SHARE))
        counts = lengths.long()
        self.starts = (counts.cumsum(0) - counts + self.spare * torch.arange(sequences, device=counts.device)).to(torch.int32)
        self.lengths = lengths.clone()
        rows = kernels.flat_rows(self.starts, lengths, total)
        buffers = []
        for part in taken:
            # Zeros, so that a masked read of spare rows never meets a NaN.
            buffer = part.new_zeros(total + sequences * self.spare, *part.shape[1:])
            buffers.append(buffer.index_copy_(0, rows, part))
        self.key, self.value, self.position = buffers
        self.tail = 0

    def _measure(self, host_lengths: list[list[int]]) -> None:
        self.row_totals = [sum(row) for row in host_lengths]
        self.max_length = max(max(row) for row in host_lengths)
        self.even = all(length == self.max_length for row in host_lengths for length in row)
