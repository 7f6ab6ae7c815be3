"""Pool: the rows of chunks, never written again and shared by copies of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Pool:
    """Rows of keys [rows, D] and values [rows, Dv] that are never written again: copies of a cache share them."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        self.key, self.value, self.pinned = key, value, key.is_pinned()

    @classmethod
    def joined(cls, pools: Sequence[Pool]) -> Pool:
        """Copies of their rows, one after the other, in pinned memory where theirs is."""
        key, value = (torch.cat([getattr(pool, name) for pool in pools]) for name in ("key", "value"))
        return cls(key.pin_memory(), value.pin_memory()) if pools[0].pinned else cls(key, value)

    def __deepcopy__(self, memo: dict) -> Pool:
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.pinned and not self.key.is_pinned() and torch.cuda.is_available():
            self.key, self.value = self.key.pin_memory(), self.value.pin_memory()

    @property
    def nbytes(self) -> int:
        return self.key.untyped_storage().nbytes() + self.value.untyped_storage().nbytes()
