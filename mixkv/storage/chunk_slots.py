"""Slots: the chunks of a `ChunkStore` that have been fetched from the host's memory to the model's device."""

from __future__ import annotations

import torch

from ..ops import dispatch, row_access
from . import chunk_bounds
from .chunk_pool import Pool


class Slots:
    """Copies of chunks where the model is: each sequence has room for as many as it attends to.

    Attributes:
        key, value: [slots * chunk, D], [.., Dv].
        slots, starts: int32 [S], how many slots each sequence has, and its first.
        chunk: int64 [S, most], the chunk that each slot holds, -1 for none.
        rows: int64 [S, most], how many rows that one has.
        longest: chunks of the sequence that has most.
        size: rows of a whole chunk.
    """

    def __init__(self, slots: torch.Tensor, most: int, longest: int, size: int, pool: Pool, device: torch.device):
        self.slots, self.starts, self.longest, self.size = slots, slots.cumsum(0) - slots, longest, size
        total = size * int(slots.sum())
        self.key, self.value = (part.new_zeros(total, part.shape[1], device=device) for part in (pool.key, pool.value))
        self.chunk = torch.full((slots.numel(), most), -1, device=device)
        self.rows = torch.zeros_like(self.chunk)

    def take_rows(self, index: torch.Tensor, batch: int, slots: torch.Tensor) -> None:
        """As `ChunkStore.take_rows`; ``slots`` [S] are the new sequences'."""
        starts = self.starts.view(batch, -1)[index].flatten()
        self.chunk, self.rows = (part.unflatten(0, (batch, -1))[index].flatten(0, 1) for part in (self.chunk, self.rows))
        total = int(slots.sum())
        old = row_access.flat_rows(starts, slots, total)
        rows = (self.size * old.unsqueeze(1) + torch.arange(self.size, device=old.device)).flatten()
        self.key, self.value = self.key[rows], self.value[rows]
        self.slots, self.starts = slots, slots.cumsum(0) - slots

    def fetch(
        self, backend: str, chosen: torch.Tensor, blocks: torch.Tensor, block_rows: torch.Tensor, pool: Pool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes the slots hold the chosen chunks, copying those that they do not hold yet.

        Args:
            chosen: int64 [S, most], -1 for none.
            blocks, block_rows: where each lies in the pool, and how many rows it has.

        Returns: where the slots' chunks lie in ``key`` and ``value``, and how many rows they have: int [S, most].
        """
        slot = torch.arange(chosen.shape[1], device=chosen.device)
        missing = (chosen >= 0) & ~self._among(self.chunk, chosen)
        free = (slot < self.slots.unsqueeze(1)) & ~self._among(chosen, self.chunk)
        # The i-th missing chunk goes to the i-th free slot; there are at least as many.
        source, target = (part.long().argsort(dim=1, descending=True, stable=True) for part in (missing, free))
        moving = slot < missing.sum(dim=1, keepdim=True)
        rows = block_rows.gather(1, source)
        for held, new in ((self.chunk, chosen.gather(1, source)), (self.rows, rows)):
            held.scatter_(1, target, torch.where(moving, new.to(held.dtype), held.gather(1, target)))
        first = self.starts.unsqueeze(1)
        arguments = (
            (self.key, self.value),
            (pool.key, pool.value),
            blocks.gather(1, source).to(torch.int32),
            (self.size * (first + target)).to(torch.int32),
            rows.masked_fill(~moving, 0).to(torch.int32),
        )
        if self.key.is_cuda:
            main, side = torch.cuda.current_stream(self.key.device), _side_stream(self.key.device)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                dispatch.fetch_chunks(backend, *arguments, chunk=self.size)
            main.wait_stream(side)
        else:
            dispatch.fetch_chunks(backend, *arguments, chunk=self.size)
        return self.size * (first + slot), self.rows.masked_fill(slot >= self.slots.unsqueeze(1), 0)

    def _among(self, some: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Which of the chunks ``asked`` [S, ...] are among ``some`` [S, ...]; -1 is none."""
        return chunk_bounds.marked(some, self.longest).gather(1, asked.clamp(min=0)) & (asked >= 0)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
