"""Reading and writing rows of a store's buffers by number, whatever they are stored as."""

from __future__ import annotations

import torch

from .arguments import RaggedBuffers
from .row_codes import dequantised, encoded


def flat_rows(starts: torch.Tensor, lengths: torch.Tensor, total: int) -> torch.Tensor:
    """The buffer rows of all sequences, one sequence after the other: int64 [total], total = lengths.sum() (host)."""
    lengths = lengths.long()
    shift = starts.long() - (lengths.cumsum(0) - lengths)
    return torch.arange(total, device=starts.device) + shift.repeat_interleave(lengths, output_size=total)


def write_rows(buffers: RaggedBuffers, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Writes ``key`` [n, D] and ``value`` [n, Dv] to buffer rows ``rows`` int64 [n], in the buffers' format."""
    _write(buffers.key, buffers.key_scale, rows, key)
    write_values(buffers, rows, value)


def write_values(buffers: RaggedBuffers, rows: torch.Tensor, value: torch.Tensor) -> None:
    """`write_rows` of ``value`` [n, Dv] alone."""
    _write(buffers.value, buffers.value_scale, rows, value)


def _write(buffer: torch.Tensor, scale: torch.Tensor | None, rows: torch.Tensor, part: torch.Tensor) -> None:
    if scale is None:
        buffer.index_copy_(0, rows, part)
        return
    codes, new_scale = encoded(part, buffer.dtype)
    buffer.index_copy_(0, rows, codes)
    scale.index_copy_(0, rows, new_scale)


def read_rows(
    buffers: RaggedBuffers, rows: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [n, D] and values [n, Dv] of buffer rows ``rows`` int [n], as they are, or of codes dequantised to ``dtype``."""
    key, value = buffers.key.index_select(0, rows), buffers.value.index_select(0, rows)
    if buffers.key_scale is None or buffers.value_scale is None:
        return key, value
    scales = (buffers.key_scale.index_select(0, rows), buffers.value_scale.index_select(0, rows))
    return dequantised(key, scales[0], dtype), dequantised(value, scales[1], dtype)
