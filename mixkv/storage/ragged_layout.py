"""RaggedLayout: where the rows of a store lie, and how many each sequence has."""

from __future__ import annotations

import torch

from ..ops import row_access
from ..ops.arguments import RaggedBuffers
from ..selection.ranking import split_positions


class RaggedLayout:
    """Where the rows of B x Hkv sequences lie, and what is held of them.

    Attributes:
        buffers: the rows with spare ones, and where each sequence lies.
        batch, heads: B and Hkv.
        dtype: of queries and of new rows, the model's; rows are in it too, unless they are in int8.
        row_totals: rows held per batch row (host).
        max_length: at least the longest sequence (host).
        spare: rows that every sequence can still take in place (host).
        tail: rows at the end of every sequence that `crop` may remove: those appended since the last selection (host).
    """

    buffers: RaggedBuffers
    row_totals: list[int]
    max_length: int
    spare: int
    tail: int
    batch: int
    heads: int
    dtype: torch.dtype
    even: bool

    @property
    def key(self) -> torch.Tensor:
        """[rows, D], spare rows included."""
        return self.buffers.key

    @property
    def value(self) -> torch.Tensor:
        """[rows, Dv], spare rows included."""
        return self.buffers.value

    @property
    def lengths(self) -> torch.Tensor:
        """int32 [B * Hkv], the rows of each sequence."""
        return self.buffers.lengths

    @property
    def coded(self) -> bool:
        """Whether rows are in int8."""
        return self.buffers.key_scale is not None

    @property
    def nbytes(self) -> int:
        """Bytes held, spare rows and bookkeeping included."""
        return self.buffers.nbytes

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """`nbytes` by what they are of: keys, values, scales and positions of the rows held, bookkeeping, and all else, spare."""
        of_rows = dict(zip(("keys", "values", "positions", "key_scales", "value_scales"), self.buffers.rows))
        kinds = {name: self.total * part.shape[1:].numel() * part.itemsize for name, part in of_rows.items()}
        kinds["scales"] = kinds.pop("key_scales", 0) + kinds.pop("value_scales", 0)
        kinds["bookkeeping"] = sum(part.untyped_storage().nbytes() for part in self._bookkeeping)
        return kinds | {"spare": self.nbytes - sum(kinds.values())}

    @property
    def _bookkeeping(self) -> list[torch.Tensor]:
        """Tensors that say where sequences lie."""
        return [self.buffers.starts, self.buffers.lengths]

    @property
    def spare_rows(self) -> int:
        """Rows allocated beyond those held, all sequences together."""
        return self.key.shape[0] - self.total

    @property
    def stride(self) -> int | None:
        """The common capacity where all sequences have the same length, so that the buffers are dense tensors; else None."""
        return self.max_length + self.spare if self.even else None

    @property
    def total(self) -> int:
        """Rows held by all sequences."""
        return sum(self.row_totals)

    def padded(self, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All sequences aligned to the right: key [B, Hkv, N, D], value [B, Hkv, N, Dv] in `dtype`, valid bool [B, Hkv, N].

        N is ``length``, no less than the longest sequence; by default `max_length`.
        """
        rows, valid = self._padded_rows(self.max_length if length is None else length)
        key, value = row_access.read_rows(self.buffers, rows.flatten(), self.dtype)
        return key.view(*rows.shape, -1), value.view(*rows.shape, -1), valid

    def padded_positions(self, length: int | None = None) -> torch.Tensor:
        """The positions of `padded` rows: int32 [B, Hkv, N], ascending, -1 in front of the first."""
        rows, valid = self._padded_rows(self.max_length if length is None else length)
        return self.buffers.position[rows].masked_fill(~valid, -1)

    def _padded_rows(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffer rows of all sequences aligned to the right, int64 [B, Hkv, length], and which of them are a sequence's own."""
        offsets = torch.arange(-length, 0, device=self.lengths.device)
        lengths = self.lengths.long().unsqueeze(1)
        rows = (self.buffers.starts.long().unsqueeze(1) + lengths + offsets).clamp(min=0)
        shape = (self.batch, self.heads, length)
        return rows.view(shape), (offsets >= -lengths).view(shape)

    def positions(self) -> list[list[torch.Tensor]]:
        """[B][Hkv] ascending int32 positions held."""
        rows = row_access.flat_rows(self.buffers.starts, self.lengths, self.total)
        return split_positions(self.buffers.position[rows], self.lengths.view(self.batch, self.heads))

    @property
    def _extent(self) -> dict[str, int | None]:
        return {"max_length": self.max_length, "stride": self.stride}

    def _count(self, new: int) -> None:
        """Every sequence has ``new`` more rows."""
        self.spare -= new
        self.max_length += new
        self.tail += new
        self.row_totals = [total + self.heads * new for total in self.row_totals]

    def _measure(self, host_lengths: list[list[int]]) -> None:
        self.row_totals = [sum(row) for row in host_lengths]
        self.max_length = max(max(row) for row in host_lengths)
        self.even = all(length == self.max_length for row in host_lengths for length in row)
