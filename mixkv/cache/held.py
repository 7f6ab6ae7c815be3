"""HeldEntries: what one attention layer holds, and how much that is."""

from __future__ import annotations

import torch

from .. import registry
from ..storage.chunks import ChunkStore
from ..storage.counted import Counted, CountsSteps
from ..storage.packed import PackedStore, Store
from ..storage.rows import Rows
from .parts import PARTS, Part, PromptSoFar, PromptStatistics, QueryWindow, RemoteHeads
from .row_scores import RowScores, RunningImportance
from .state import CacheState


class HeldEntries(CountsSteps):
    """What a layer holds; a `MixKVLayer` is one.

    Attributes:
        state: what the layers of a cache share.
        shape: KV heads, key size, value size; None before the first forward.
        dtype: of keys and values.
        seen: tokens seen, padding included.
        is_initialized: whether a forward has come.
        prompt, rows, remote, window, scores, running, statistics: the parts of `parts.PARTS`, None where there is nothing.
    """

    state: CacheState
    shape: tuple[int, int, int] | None
    dtype: torch.dtype
    seen = Counted()
    is_initialized: bool
    prompt: PromptSoFar | None
    rows: Rows | None
    remote: RemoteHeads | None
    window: QueryWindow | None
    scores: RowScores | None = None
    running: RunningImportance | None = None
    statistics: PromptStatistics | None

    def _add_steps(self, new: int) -> None:
        self.__dict__["seen"] += new

    @property
    def parts(self) -> list[Part]:
        """What the layer holds."""
        return [part for part in map(self.__dict__.get, PARTS) if part is not None]

    @property
    def store(self) -> Store | None:
        """The rows that every query attends to; None until the prompt has been read."""
        return None if self.rows is None else self.rows.resident

    @property
    def chunks(self) -> ChunkStore | None:
        """The rows of ``hybridkv``'s dynamic heads."""
        return None if self.rows is None else self.rows.chunks

    @property
    def batch(self) -> int:
        if self.store is not None:
            return self.store.batch
        return 0 if self.prompt is None else self.prompt.key.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by this layer, spare capacity and bookkeeping included."""
        return sum(part.nbytes for part in self.parts)

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """`nbytes` by what they are of: those of `Rows.bytes_by_kind`, ``prompt``, and ``statistics`` for all other parts."""
        kinds = {} if self.rows is None else dict(self.rows.bytes_by_kind)
        kinds["prompt"] = 0 if self.prompt is None else self.prompt.nbytes
        others = [part for part in self.parts if part is not self.rows and part is not self.prompt]
        return kinds | {"statistics": sum(part.nbytes for part in others)}

    @property
    def nbytes_outside(self) -> int:
        """Bytes of them that are not resident: chunks of dynamic heads under ``offload``."""
        outside = self.chunks is not None and self.state.config.offload and self.chunks.pool.key.device.type == "cpu"
        return self.chunks.pool.nbytes if outside else 0

    @property
    def nbytes_full(self) -> int:
        """Bytes an uncompressed cache holds after the same tokens."""
        if not self.is_initialized:
            return 0
        heads, key_size, value_size = self.shape
        return self.batch * heads * self.seen * (key_size + value_size) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of the keys and values of `lengths`, with their scales, without positions and spare capacity."""
        heads, key_size, value_size = self.shape
        rows, sizes = int(self.lengths().sum()), (key_size, value_size, self.dtype.itemsize)
        if self.rows is None:
            return rows * (key_size + value_size) * self.dtype.itemsize
        chosen = registry.row_format(self.state.config.rows)
        recent = self.store.recent.total if isinstance(self.store, PackedStore) else 0
        return (rows - recent) * chosen.row_bytes(*sizes) + recent * chosen.recent_bytes(*sizes)

    def lengths(self) -> torch.Tensor:
        """Rows resident, those of slots for chunks included: int64 [B, Hkv], on the CPU."""
        if self.rows is not None:
            return self.rows.lengths()
        return torch.full((self.batch, self.shape[0] if self.shape else 0), self.seen)

    def kept(self) -> list[list[torch.Tensor]]:
        """[B][Hkv] ascending positions held, those in chunks included."""
        if self.rows is not None:
            return self.rows.positions()
        heads = self.shape[0] if self.shape else 0
        return [[torch.arange(self.seen, dtype=torch.int32) for _ in range(heads)] for _ in range(self.batch)]
