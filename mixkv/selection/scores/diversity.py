"""Diversity and redundancy: how alike the keys of a head are."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...ops.score_reference import by_block, token_blocks


class Directions(NamedTuple):
    """What the keys of each head point to: inverse norms [B, Hkv, N], mean unit key [B, Hkv, D], valid keys [B, Hkv]."""

    inverse_norm: torch.Tensor
    mean: torch.Tensor
    count: torch.Tensor


def directions(key: torch.Tensor, valid: torch.Tensor) -> Directions:
    """Reads ``key`` [B, Hkv, N, D] once for `redundancy` and `similarity`; keys that are not valid do not count."""
    real = valid.expand(key.shape[:3])
    inverse_norm, total = _unit_sums(key, real.unsqueeze(2))
    count = real.sum(dim=-1).float()
    return Directions(inverse_norm, total.squeeze(2) / count.clamp(min=1).unsqueeze(-1), count)


def redundancy(found: Directions) -> torch.Tensor:
    """Mean cosine between different keys of a head, clamped to [0, 1] (MixKV, arXiv 2510.20707, equation 6), in O(N D).

    With unit keys u_i and their mean m it equals ``(N |m|^2 - 1) / (N - 1)``.

    Returns: [B, Hkv] float32; 0 where there is a single key.
    """
    numerator = found.count * found.mean.square().sum(dim=-1) - 1
    return (numerator / (found.count - 1).clamp(min=1)).clamp(0, 1)


def similarity(key: torch.Tensor, found: Directions) -> torch.Tensor:
    """Cosine of each key with what the head's keys have in common: <u_i, mean u>, not re-normalised (KeyDiff, 2504.15364).

    Returns: [B, Hkv, N] float32.
    """
    mean = found.mean.unsqueeze(2)
    # As a row times a matrix: torch multiplies a matrix by a column several times slower.
    along = by_block(key, key.shape[3], lambda part: (mean @ part.float().transpose(-1, -2)).squeeze(2))
    return along * found.inverse_norm


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
    inverse_norm, total = _unit_sums(key, kinds)
    count = kinds.sum(dim=-1).float()
    found = Directions(inverse_norm, total / count.clamp(min=1).unsqueeze(-1), count)
    return redundancy(found).masked_fill(count == 0, torch.nan)


def _unit_sums(key: torch.Tensor, kinds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse norms of keys [B, Hkv, N, D], and the sum of the unit keys of each of K kinds, a block of tokens at a time.

    Args:
        kinds: bool, broadcasts to [B, Hkv, K, N].

    Returns: float32 [B, Hkv, N], [B, Hkv, K, D].
    """
    inverse_norms, total = [], None
    for first, last in token_blocks(key, key.shape[3]):
        part = key[:, :, first:last].float()
        inverse_norm = 1 / torch.linalg.vector_norm(part, dim=-1).clamp_(min=1e-12)
        block = (inverse_norm.unsqueeze(2) * kinds[..., first:last]) @ part
        total = block if total is None else total + block
        inverse_norms.append(inverse_norm)
    return torch.cat(inverse_norms, dim=-1), total
