"""Rows: what a layer asks of the store that holds its KV entries, and the two stores that there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch

from ..config import MixKVConfig
from ..ops.arguments import LogitOptions
from .chunks import ChunkStore
from .packed import PackedStore, Store
from .ragged import RaggedStore

Tensors = dict[str, torch.Tensor]
Numbers = dict[str, Any]

# Name in files -> attribute of a `ChunkStore`.
_CHUNK_LAYOUT = {"chunk_rows": "rows", "chunk_columns": "first_positions", "chunk_slots": "slots"}


class Rows(Protocol):
    """The KV entries of one layer: B x Hkv sequences of rows.

    Attributes:
        resident: the rows that every query attends to.
        chunks: those in chunks, of which every query chooses some; None: there are none.
    """

    resident: Store
    chunks: ChunkStore | None

    @property
    def nbytes(self) -> int:
        """Bytes held, those of chunks included."""

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """`nbytes` by what they are of: ``keys``, ``values``, ``scales`` and ``positions`` of rows, ``spare``, and so on."""

    def decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: int, logits: LogitOptions
    ) -> torch.Tensor:
        """Stores one row key, value [B, Hkv, 1, D] of ``position``, and attends: query [B, Hq, 1, D] to [B, 1, Hq, Dv]."""

    def extend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position: int,
        logits: LogitOptions,
        *,
        mask: torch.Tensor | None,
        valid: torch.Tensor | None,
        before_storing: Callable[[], None],
    ) -> torch.Tensor:
        """Attention of n new tokens over the rows and each other; stores theirs, padding left out.

        Args:
            query: [B, Hq, n, D].
            key, value: [B, Hkv, n, D].
            position: of the first.
            logits: how the model computes its logits.
            mask: bool [B or 1, 1, n, n] in place of the causal mask among the new tokens; None: causal.
            valid: bool [B, n], False for padding; None: there is none.
            before_storing: is called before the first change; an exception before it leaves the rows as they were.

        Returns: [B, n, Hq, Dv].
        """

    def take_rows(self, rows: list[int]) -> None:
        """Makes batch row i a copy of former batch row ``rows[i]``."""

    def lengths(self) -> torch.Tensor:
        """int64 [B, Hkv] on the CPU: rows that are resident, places for chunks included."""

    def positions(self) -> list[list[torch.Tensor]]:
        """[B][Hkv] ascending int32 positions held, those in chunks included."""

    def state(self) -> tuple[Tensors, Numbers]:
        """What `restore` needs; tensors of rows are copies."""


class RaggedRows:
    """All rows resident."""

    chunks: ChunkStore | None = None

    def __init__(self, resident: Store):
        self.resident = resident

    @property
    def nbytes(self) -> int:
        return self.resident.nbytes

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        return self.resident.bytes_by_kind

    def decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: int, logits: LogitOptions
    ) -> torch.Tensor:
        return self.resident.append_attend(query, key, value, position, logits)

    def extend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position: int,
        logits: LogitOptions,
        *,
        mask: torch.Tensor | None,
        valid: torch.Tensor | None,
        before_storing: Callable[[], None],
    ) -> torch.Tensor:
        output = self.resident.attend_extend(query, key, value, logits, mask=mask)
        before_storing()
        self.resident.append(key, value, position, valid)
        return output

    def take_rows(self, rows: list[int]) -> None:
        self.resident.take_rows(rows)

    def lengths(self) -> torch.Tensor:
        store = self.resident
        return store.lengths.view(store.batch, store.heads).long().cpu()

    def positions(self) -> list[list[torch.Tensor]]:
        return self.resident.positions()

    def state(self) -> tuple[Tensors, Numbers]:
        return self.resident.state()


class ChunkedRows(RaggedRows):
    """Resident rows, and beside them chunks of which every query position chooses some (``hybridkv``)."""

    def __init__(self, resident: Store, chunks: ChunkStore):
        super().__init__(resident)
        self.chunks = chunks

    @property
    def nbytes(self) -> int:
        return self.resident.nbytes + self.chunks.nbytes

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        kinds, chunks = super().bytes_by_kind, self.chunks.bytes_by_kind
        return {kind: kinds.get(kind, 0) + chunks.get(kind, 0) for kind in kinds | chunks}

    def decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: int, logits: LogitOptions
    ) -> torch.Tensor:
        store = cast(RaggedStore, self.resident)
        store.append(key, value, position)
        return self.chunks.attend(store, query, store.lengths.view(store.batch, 1, -1), logits)

    def extend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position: int,
        logits: LogitOptions,
        *,
        mask: torch.Tensor | None,
        valid: torch.Tensor | None,
        before_storing: Callable[[], None],
    ) -> torch.Tensor:
        # Each position chooses for itself, as it would in a forward of its own.
        store, new = cast(RaggedStore, self.resident), key.shape[2]
        before = store.lengths.view(store.batch, 1, -1).clone()
        before_storing()
        store.append(key, value, position, valid)
        if valid is None:
            added = torch.arange(1, new + 1, dtype=torch.int32, device=key.device).view(1, -1, 1)
        else:
            added = valid.cumsum(dim=-1, dtype=torch.int32).unsqueeze(-1)
        return self.chunks.attend(store, query, before + added, logits)

    def take_rows(self, rows: list[int]) -> None:
        super().take_rows(rows)
        self.chunks.take_rows(rows)

    def lengths(self) -> torch.Tensor:
        store = self.resident
        rows = store.lengths + self.chunks.chunk * self.chunks.slots
        return rows.view(store.batch, store.heads).long().cpu()

    def positions(self) -> list[list[torch.Tensor]]:
        return self.chunks.join(self.resident.positions())

    def state(self) -> tuple[Tensors, Numbers]:
        tensors, numbers = super().state()
        key, value = self.chunks.held()
        shape = (self.resident.batch, self.resident.heads)
        layout = {name: getattr(self.chunks, attribute).view(shape) for name, attribute in _CHUNK_LAYOUT.items()}
        return {**tensors, "chunk_key": key, "chunk_value": value, **layout}, numbers


def with_chunks(rows: Rows, chunks: ChunkStore | None) -> Rows:
    """Rows of a layer, in chunks as well or not."""
    return rows if chunks is None else ChunkedRows(rows.resident, chunks)


def restore(tensors: Tensors, numbers: Numbers, config: MixKVConfig, dtype: torch.dtype) -> Rows:
    """The rows whose ``state`` these are, on the tensors' device, of a model of ``dtype``."""
    if "packed_key" in tensors:
        return RaggedRows(PackedStore.from_state(tensors, numbers, config.backend, dtype))
    store = RaggedStore.from_state(tensors, numbers, config.backend, dtype)
    if "chunk_key" not in tensors:
        return RaggedRows(store)
    chunks = ChunkStore.from_rows(
        tensors["chunk_key"],
        tensors["chunk_value"],
        **{attribute: tensors[name].flatten() for name, attribute in _CHUNK_LAYOUT.items()},
        batch=store.batch,
        backend=config.backend,
        chunk=config.hybrid_chunk,
        offload=config.offload,
    )
    return ChunkedRows(store, chunks)
