"""Diversity and redundancy: how alike the keys of a head are."""

from __future__ import annotations

import torch

from ...ops.score_reference import Directions, directions, redundancy, similarity, unit_sums

__all__ = ["Directions", "directions", "modal_redundancy", "redundancy", "similarity"]


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
