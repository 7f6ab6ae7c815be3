"""Stores and inputs for checks: lengths of all kinds, every layout that models produce, and NaNs wherever nothing may be read."""

from __future__ import annotations

import random

import torch

from .arguments import RaggedBuffers


class Stores:
    """Random numbers on ``device``.

    Args:
        device: where.
        chance: decides on lengths and layouts.
        poisoned: whether what no sequence owns is NaN, else zero.
    """

    def __init__(self, device: torch.device, chance: random.Random, *, poisoned: bool):
        self.device, self.chance, self.poisoned = device, chance, poisoned

    def make(self, size: int, value_size: int, lengths: list[int], dtype: torch.dtype, spare: int = 24) -> RaggedBuffers:
        """Flat storage of normal rows, with gaps between sequences."""
        starts, at = [], 3
        for length in lengths:
            starts.append(at)
            at += length + spare + self.chance.randint(0, 5)
        owned = torch.zeros(at + 2, 1, dtype=torch.bool)
        for start, length in zip(starts, lengths):
            owned[start : start + length] = True
        filling = torch.nan if self.poisoned else 0.0
        key, value = (
            torch.randn(at + 2, width).masked_fill(~owned, filling).to(dtype).to(self.device) for width in (size, value_size)
        )
        position = torch.full((at + 2,), -7, dtype=torch.int32, device=self.device)
        return RaggedBuffers(key, value, position, self.ints(starts), self.ints(lengths))

    def ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def strided(self, batch: int, rows: int, heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """[batch, heads, rows, size] in one of the layouts that models produce."""
        layout = self.chance.choice(("dense", "transposed", "slice"))
        if layout == "dense":
            return torch.randn(batch, heads, rows, size, device=self.device).to(dtype)
        extra = 24 if layout == "slice" else 0
        whole = torch.randn(batch, rows, heads, size + extra, device=self.device).to(dtype)
        # An odd offset: rows that do not begin at a multiple of 16 bytes.
        return whole[..., extra // 8 : extra // 8 + size].transpose(1, 2)

    def poison(self) -> None:
        """Leaves NaNs in the memory that the next outputs and scratch tensors get."""
        for size in (1 << 10, 1 << 14, 1 << 18, 1 << 22):
            torch.full((size,), torch.nan, device=self.device)


def clean(store: RaggedBuffers, dtype: torch.dtype | None = None) -> RaggedBuffers:
    """A copy without NaNs, its rows in ``dtype``: plain torch reads spare rows, masked."""
    key, value = (part.nan_to_num(0.0).to(dtype or part.dtype) for part in (store.key, store.value))
    return store._replace(key=key, value=value)


def copied(store: RaggedBuffers) -> RaggedBuffers:
    return RaggedBuffers._make(None if part is None else part.clone() for part in store)


def same(found: torch.Tensor | None, wanted: torch.Tensor | None) -> bool:
    """Whether both are equal to the bit; NaNs are equal."""
    if found is None or wanted is None:
        return found is wanted
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    return torch.equal(found.nan_to_num(1.5), wanted.nan_to_num(1.5))
