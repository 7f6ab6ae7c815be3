"""How the sequences of a store lie in flat buffers: one after the other, each followed by spare rows."""

from __future__ import annotations

import torch

from .arguments import RaggedBuffers

# Spare rows a sequence gets whenever the buffers are laid out: a share of its mean length, and at least so many. A layout
# copies every row once, so a decode step copies at most 1 / share rows per sequence on average, however long it runs.
SPARE_SHARE = 1 / 8
SPARE_ROWS = 16


def spare_per_sequence(total: int, sequences: int, new: int = 0) -> int:
    """Spare rows of each sequence in a new layout of ``total`` rows, room for ``new`` included."""
    return new + max(SPARE_ROWS, int(total / sequences * SPARE_SHARE))


def empty_buffers(
    lengths: torch.Tensor, total: int, spare: int, like: tuple[torch.Tensor, ...], *, codes: bool = False
) -> RaggedBuffers:
    """Buffers for ``total`` rows in sequences of ``lengths`` [S], each with ``spare`` rows.

    Args:
        like: key [..., D] and value [..., Dv], and whatever else `RaggedBuffers.rows` has: dtypes and widths are as there.
        codes: keys and values are in int8 all the same.
    """
    lengths = lengths.to(torch.int32, copy=True)
    order = torch.arange(0, spare * lengths.numel(), spare, dtype=torch.int32, device=lengths.device)
    starts = lengths.cumsum(0, dtype=torch.int32).sub_(lengths).add_(order)
    rows = total + lengths.numel() * spare
    # Zeros, so that a masked read of spare rows never meets a NaN.
    dtype = torch.int8 if codes else like[0].dtype
    coded = dtype in (torch.int8, torch.uint8)
    key, value = (part.new_zeros(rows, part.shape[-1], dtype=dtype) for part in like[:2])
    position = torch.zeros(rows, dtype=torch.int32, device=lengths.device)
    if not coded:
        return RaggedBuffers(key, value, position, starts, lengths)
    scales = (key.new_zeros(rows, dtype=torch.float16) for _ in range(2))
    return RaggedBuffers(key, value, position, starts, lengths, *scales)
