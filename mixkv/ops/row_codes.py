"""Rows in int8: a row x of keys or values is stored as codes and one scale, with x about ``codes * scale``.

An element's error is at most half a scale, a 254th of the row's largest element.
"""

from __future__ import annotations

import torch

_LEVELS = 127
# The largest scale that float16 holds.
_MOST = 65504.0


def quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [..., D] and scales float16 [...] of rows [..., D]: symmetric, the largest element at 127."""
    rows = rows.float()
    scale = (rows.abs().amax(dim=-1) * (1 / _LEVELS)).clamp(max=_MOST).to(torch.float16)
    # Codes are those of the scale as it is stored; a row whose scale is rounded to 0 is all zeros.
    step = scale.float()
    inverse = torch.where(step > 0, 1 / step, 0.0)
    codes = (rows * inverse.unsqueeze(-1)).round().clamp(-_LEVELS, _LEVELS)
    return codes.to(torch.int8), scale


def dequantised(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows [..., D] of ``dtype`` from codes int8 [..., D] and scales float16 [...]."""
    return (codes.float() * scale.float().unsqueeze(-1)).to(dtype)
