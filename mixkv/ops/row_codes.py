"""Rows in codes: a row x of keys or values is stored as small integers and one float16 scale, with x about ``codes * scale``.

In 8 bits codes are the integers -127 .. 127; an element's error is at most half a scale, a 254th of the row's largest element. In 4
bits a code stands for one of 16 such integers, `LEVELS`, which lie as the means of a normal distribution do whose mean square error
is least (Lloyd 1982, Max 1960). For them rows are rotated first, so that their elements are nearly normal: `rotated`.
"""

from __future__ import annotations

import functools
import math

import torch

_LEVELS = 127
# The largest scale that float16 holds.
_MOST = 65504.0
# 127 times the levels for a standard normal distribution, divided by the largest.
LEVELS = (-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127)
_DEVIATION = 127 / 2.7326
# Times that the scale is fitted to the codes that it gives.
_FITS = 3


def quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [..., D] and scales float16 [...] of rows [..., D]: symmetric, the largest element at 127."""
    rows = rows.float()
    scale = (rows.abs().amax(dim=-1) * (1 / _LEVELS)).clamp(max=_MOST).to(torch.float16)
    # Codes are those of the scale as it is stored; a row whose scale is rounded to 0 is all zeros.
    codes = (rows * _inverse(scale).unsqueeze(-1)).round().clamp(-_LEVELS, _LEVELS)
    return codes.to(torch.int8), scale


def packed(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., D / 2] and scales float16 [...] of rows [..., D]; element i in the lower, i + D / 2 in the upper four bits."""
    rows = rows.float()
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=rows.device)
    bounds = (levels[1:] + levels[:-1]) / 2
    scale = rows.square().mean(dim=-1).sqrt() / _DEVIATION
    for _ in range(_FITS):
        near = levels[torch.bucketize(rows / scale.clamp(min=1e-30).unsqueeze(-1), bounds)]
        scale = (rows * near).sum(dim=-1) / near.square().sum(dim=-1)
    held = scale.clamp(max=_MOST).to(torch.float16)
    codes = torch.bucketize(rows * _inverse(held).unsqueeze(-1), bounds).to(torch.uint8)
    half = rows.shape[-1] // 2
    return codes[..., :half] | (codes[..., half:] << 4), held


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """The levels int8 [..., D] that codes of `packed` uint8 [..., D / 2] stand for."""
    levels = torch.tensor(LEVELS, dtype=torch.int8, device=codes.device)
    return levels[torch.cat([codes & 15, codes >> 4], dim=-1).int()]


def encoded(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantised` for codes of int8, `packed` for codes of uint8."""
    return packed(rows) if dtype == torch.uint8 else quantised(rows)


def dequantised(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows [..., D] of ``dtype`` from what `quantised` or `packed` returned."""
    codes = unpacked(codes) if codes.dtype == torch.uint8 else codes
    return (codes.float() * scale.float().unsqueeze(-1)).to(dtype)


def rotated(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` [..., D] times an orthogonal matrix: random signs, then a Hadamard matrix of the largest power of 2 that divides D."""
    return rows @ _rotation(rows.shape[-1], rows.dtype, rows.device)


def rotated_back(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of `rotated`."""
    return rows @ _rotation(rows.shape[-1], rows.dtype, rows.device).T


@functools.lru_cache(maxsize=64)
def _rotation(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    block = torch.ones(1, 1, dtype=torch.float64)
    while size % (2 * block.shape[0]) == 0:
        block = torch.cat([torch.cat([block, block], dim=1), torch.cat([block, -block], dim=1)])
    whole = torch.block_diag(*[block / math.sqrt(block.shape[0])] * (size // block.shape[0]))
    # The signs are part of the format: cached files depend on them.
    signs = torch.tensor(
        [1.0 if (index * index * 2654435761 >> 13) & 1 else -1.0 for index in range(size)], dtype=torch.float64
    )
    return (signs.unsqueeze(-1) * whole).to(device, dtype)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    step = scale.float()
    return torch.where(step > 0, 1 / step, 0.0)
