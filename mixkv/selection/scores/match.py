"""Numbers of different kinds made comparable."""

from __future__ import annotations

import torch


def match(raw: torch.Tensor, reference: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Makes a raw score comparable with the attention score: min-max scaled, then given the reference's mean.

    Min, max and means run over the valid candidates of each head (MixKV, arXiv 2510.20707, equation 4).

    Args:
        raw, reference: [B, Hkv, M].
        valid: bool, broadcasts to them.

    Returns: [B, Hkv, M]; zeros where all raw scores are equal.
    """
    if raw.shape[-1] == 0:
        return raw
    low = raw.masked_fill(~valid, torch.inf).amin(dim=-1, keepdim=True)
    high = raw.masked_fill(~valid, -torch.inf).amax(dim=-1, keepdim=True)
    scaled = ((raw - low) / (high - low)).masked_fill(~(valid & (high > low)), 0.0)
    count = valid.expand_as(raw).sum(dim=-1, keepdim=True).clamp(min=1)
    mean = scaled.sum(dim=-1, keepdim=True) / count
    target = reference.masked_fill(~valid, 0.0).sum(dim=-1, keepdim=True) / count
    return scaled * torch.where(mean > 0, target / mean, 0.0)
