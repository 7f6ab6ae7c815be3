"""Diversity and redundancy: how alike the keys of a head are."""

from __future__ import annotations

import torch

from ...ops.score_reference import Directions, directions, similarity, unit_sums

__all__ = ["Directions", "directions", "modal_redundancy", "redundancy", "similarity"]


def redundancy(found: Directions) -> torch.Tensor:
    """Mean cosine between different keys of a head, clamped to [0, 1] (MixKV, arXiv 2510.20707, equation 6), in O(N D).

    With unit keys u_i and their mean m it equals ``(N |m|^2 - 1) / (N - 1)``.

    Returns: [B, Hkv] float32; 0 where there is a single key.
    """
    numerator = found.count * found.mean.square().sum(dim=-1) - 1
    return (numerator / (found.count - 1).clamp(min=1)).clamp(0, 1)


def modal_redundancy(key: torch.Tensor, image: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """`redundancy` of the image keys and of the text keys, each among themselves.

    Args:
        key: [B, Hkv, N, D].
        image: bool [B, N].
        valid: bool [B, N], False for padding; None: no padding.

    Returns: float32 [B, Hkv, 2], images first; nan where a row has no key of a kind.
    """
    text = ~image if valid is None else valid & ~image
    kinds = torch.stack([image, text], dim=1).unsqueeze(1)
    inverse_norm, total = unit_sums(key, kinds)
    count = kinds.sum(dim=-1).float()
    found = Directions(inverse_norm, total / count.clamp(min=1).unsqueeze(-1), count)
    return redundancy(found).masked_fill(count == 0, torch.nan)
