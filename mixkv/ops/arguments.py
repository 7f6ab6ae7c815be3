"""What the operations on storage take together: the buffers of a store, the chunks of a step, the options of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class RaggedBuffers(NamedTuple):
    """The rows of S = B * Hkv sequences (batch row by batch row, KV head by KV head) in flat buffers.

    Sequence s owns the rows ``starts[s] .. starts[s] + lengths[s]``, followed by spare rows.

    Attributes:
        key: [rows, D].
        value: [rows, Dv].
        position: int32 [rows], the position in the sequence of tokens that each row came from.
        starts: int32 [S], the first row of each sequence.
        lengths: int32 [S], the rows of each sequence.
        key_scale, value_scale: float16 [rows], the scales of keys and values in codes, see `mixkv.ops.row_codes`; None: they are
            in the model's dtype.
    """

    key: torch.Tensor
    value: torch.Tensor
    position: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @property
    def rows(self) -> tuple[torch.Tensor, ...]:
        """The buffers that have an entry for each row: key, value, position, and key_scale, value_scale where there are any."""
        rows = (self.key, self.value, self.position)
        return rows if self.key_scale is None or self.value_scale is None else (*rows, self.key_scale, self.value_scale)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the buffers keep, spare rows included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self if tensor is not None)


class Packed(NamedTuple):
    """Rows in 4 bits that come before a store's own in every sequence.

    Attributes:
        buffers: their codes, see `mixkv.ops.row_codes.packed`: key uint8 [rows, D / 2], value uint8 [rows, Dv / 2].
        max_length: at least ``buffers.lengths.max()`` (host).
    """

    buffers: RaggedBuffers
    max_length: int


class FixedRoom(NamedTuple):
    """What a decode step of which the host knows no length reads of S sequences besides their `RaggedBuffers`.

    Attributes:
        ends: int32 [S], the row behind the room of each sequence.
        evicted: int32 [S], how many tokens each sequence has seen and does not hold: its length and this is its next position.
    """

    ends: torch.Tensor
    evicted: torch.Tensor


class ChosenChunks(NamedTuple):
    """Chunks of rows outside the store that sequences attend to in a step, up to K each.

    Attributes:
        key: [rows, D], the rows of all chunks.
        value: [rows, Dv].
        starts: int32 [S, K], the first row of each chosen chunk.
        lengths: int32 [S, K], the rows of each chosen chunk; 0 where none is chosen.
        size: at least ``lengths.max()`` (host).
    """

    key: torch.Tensor
    value: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    size: int


@dataclass(frozen=True)
class LogitOptions:
    """How a model computes attention logits.

    Attributes:
        scaling: factor on the products of queries and keys.
        softcap: logits are ``softcap * tanh(logits / softcap)``; None: they are not capped.
        sinks: [Hq], logits that take attention mass and have no row; None: there are none.
    """

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        size: int,
        scaling: float | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> LogitOptions:
        """Options for heads of ``size`` elements; the default ``scaling`` is ``size ** -0.5``."""
        return cls(size**-0.5 if scaling is None else scaling, softcap, None if sinks is None else sinks.detach())
