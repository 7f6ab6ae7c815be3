"""Scores of a head pooled, brought to one scale and mixed, in plain torch: the ground truth for the compiled operations, and the fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def match(raw: torch.Tensor, reference: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Makes a raw score comparable with the attention score: min-max scaled, then given the reference's mean.

    Min, max and means run over the valid candidates of each head (MixKV, arXiv 2510.20707, equation 4).

    Args:
        raw, reference: [B, Hkv, M].
        valid: bool, broadcasts to them; None: all are valid.

    Returns: [B, Hkv, M]; zeros where all raw scores are equal.
    """
    if raw.shape[-1] == 0:
        return raw
    valid = torch.ones(1, 1, 1, dtype=torch.bool, device=raw.device) if valid is None else valid
    low = raw.masked_fill(~valid, torch.inf).amin(dim=-1, keepdim=True)
    high = raw.masked_fill(~valid, -torch.inf).amax(dim=-1, keepdim=True)
    scaled = ((raw - low) / (high - low)).masked_fill(~(valid & (high > low)), 0.0)
    count = valid.expand_as(raw).sum(dim=-1, keepdim=True).clamp(min=1)
    mean = scaled.sum(dim=-1, keepdim=True) / count
    target = reference.masked_fill(~valid, 0.0).sum(dim=-1, keepdim=True) / count
    return scaled * torch.where(mean > 0, target / mean, 0.0)


def mix(
    importance: torch.Tensor,
    similarity: torch.Tensor,
    value_norm: torch.Tensor,
    share: torch.Tensor,
    valid: torch.Tensor | None,
) -> torch.Tensor:
    """``share * diversity + (1 - share) * (importance + value norm)`` (MixKV, arXiv 2510.20707, equation 7).

    Diversity is minus the similarity; it and the value norm are brought to the scale of importance by `match`.

    Args:
        importance, similarity, value_norm: [B, Hkv, M].
        share: [B, Hkv].
        valid: bool, broadcasts to [B, Hkv, M]; None: all are valid.

    Returns: [B, Hkv, M].
    """
    share = share.unsqueeze(-1)
    diversity = match(-similarity, importance, valid)
    return share * diversity + (1 - share) * (importance + match(value_norm, importance, valid))


def normalized(importance: torch.Tensor, exponent: float) -> torch.Tensor:
    """Importance [B, Hkv, M] divided by the largest of its batch row to the power of ``exponent``; where that is not positive, as is."""
    if importance.shape[-1] == 0:
        return importance
    largest = importance.amax(dim=(-2, -1), keepdim=True)
    return torch.where(largest > 0, importance / largest**exponent, importance)


def pool(attention: torch.Tensor, kernel_size: int, pooling: str) -> torch.Tensor:
    """1-D pooling over neighbouring candidates, same length; the zeros beyond both ends count in the average.

    Args:
        attention: [B, Hkv, M], non-negative.
        kernel_size: neighbours that are taken together, odd.
        pooling: ``avg`` or ``max``.

    Returns: [B, Hkv, M].
    """
    if attention.shape[-1] == 0:
        return attention
    operation = F.max_pool1d if pooling == "max" else F.avg_pool1d
    return operation(attention, kernel_size, stride=1, padding=kernel_size // 2)
