"""Selected rows in 4 bits, rotated, the window and later rows in 8: see `mixkv.storage.packed` and `mixkv.ops.row_codes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...registry import RowFormat, add
from ..packed import PackedStore
from ..rows import RaggedRows
from . import int8

if TYPE_CHECKING:
    import torch

    from ...selection.ranking import Selection


def rows(key: torch.Tensor, value: torch.Tensor, selection: Selection, backend: str) -> RaggedRows:
    return RaggedRows(PackedStore.from_selection(key, value, selection, backend))


def row_bytes(key_size: int, value_size: int, itemsize: int) -> int:
    return key_size // 2 + 2 + value_size // 2 + 2


add(
    RowFormat(
        "int4", rows, row_bytes, int8.row_bytes, "4 bits an element; the window and later tokens 8 bits", codes=True, packs=True
    )
)
