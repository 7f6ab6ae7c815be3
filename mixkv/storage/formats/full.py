"""Rows in the model's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...registry import RowFormat, add
from ..ragged import RaggedStore
from ..rows import RaggedRows

if TYPE_CHECKING:
    import torch

    from ...selection.ranking import Selection


def rows(key: torch.Tensor, value: torch.Tensor, selection: Selection, backend: str) -> RaggedRows:
    return RaggedRows(RaggedStore.from_selection(key, value, selection, backend))


def row_bytes(key_size: int, value_size: int, itemsize: int) -> int:
    return (key_size + value_size) * itemsize


add(RowFormat("full", rows, row_bytes, row_bytes, "the model's dtype"))
