"""What decode steps have in common, made once: where the rows of sequences lie, and what a mask adds to logits."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary


class SequenceRows(NamedTuple):
    """Where sequences lie, in the numbers that gathering takes.

    Attributes:
        starts: int64 [S].
        offsets: int32 [n], 0, 1, ...
        rows: int32 [S, n], the rows from each start on; those beyond the buffer are its last.
    """

    starts: torch.Tensor
    offsets: torch.Tensor
    rows: torch.Tensor


# By the tensor of starts: the steps between two layouts have them in common. Who changes one in place calls `starts_changed`.
_known_rows: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Rows beyond the longest sequence that are found at once.
_ROWS_AHEAD = 64


def sequence_rows(starts: torch.Tensor, longest: int, buffer_rows: int = 0) -> SequenceRows:
    """Of sequences from ``starts`` int32 [S] on, at least ``longest`` rows each, in a buffer of so many rows."""
    known = _known_rows.get(starts)
    if known is None or known.offsets.numel() < longest:
        count = longest + _ROWS_AHEAD if longest else 0
        offsets = torch.arange(count, dtype=torch.int32, device=starts.device)
        # Beyond a sequence's end other rows are read, and masked: all that matters is to stay inside the buffer.
        rows = (starts.unsqueeze(1) + offsets).clamp_(max=max(buffer_rows - 1, 0))
        known = _known_rows[starts] = SequenceRows(starts.long(), offsets, rows)
    return known


def starts_changed(starts: torch.Tensor) -> None:
    """``starts`` has been changed in place."""
    _known_rows.pop(starts, None)


@functools.cache
def seen_or_hidden(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Scalars: what is added to the logit of a row that is seen, and of one that is not."""
    # Made in inference mode they could not be used elsewhere.
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device), torch.full((), -torch.inf, dtype=dtype, device=device)
