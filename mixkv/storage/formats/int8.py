"""Rows in int8: each key and each value has one float16 scale, see `mixkv.ops.row_codes`. New rows too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...registry import RowFormat, add
from ..ragged import RaggedStore
from ..rows import RaggedRows

if TYPE_CHECKING:
    import torch

    from ...selection.ranking import Selection


def rows(key: torch.Tensor, value: torch.Tensor, selection: Selection, backend: str) -> RaggedRows:
    return RaggedRows(RaggedStore.from_selection(key, value, selection, backend, codes=True))


def row_bytes(key_size: int, value_size: int, itemsize: int) -> int:
    return key_size + 2 + value_size + 2


add(RowFormat("int8", rows, row_bytes, row_bytes, "8 bits an element, a scale for each key and each value", codes=True))
