"""Scores: one number per candidate row and KV head, higher is kept. Pure functions, float32 throughout.

Shapes: B batch rows, Hq query heads, Hkv KV heads, G = Hq // Hkv, N prompt columns, W window columns (the last ones),
M = N - W candidate columns, D head size. ``valid`` is a bool tensor that broadcasts to [B, Hkv, N]; a column that is not
valid (padding) is never counted and scores -inf.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import registry
from ..ops.reference import norm


def pool(attention: torch.Tensor, kernel_size: int, pooling: str) -> torch.Tensor:
    """1-D pooling over neighbouring candidates, same length; the zeros beyond both ends count in the average.

    Args:
        attention: [B, Hkv, M], non-negative.

    Returns: [B, Hkv, M].
    """
    if attention.shape[-1] == 0:
        return attention
    operation = F.max_pool1d if pooling == "max" else F.avg_pool1d
    return operation(attention, kernel_size, stride=1, padding=kernel_size // 2)


# Neighbours that share the importance of a peak in `output_importance`.
_OUTPUT_KERNEL = 9


def output_importance(weights: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """What the window takes out of each row, in units of the residual stream: comparable across heads and layers.

    The root mean square of its weights favours what *some* window query needs much over what all need a little; pooling
    keeps the neighbours of a peak.

    Args:
        weights: [B, Hkv, M], `window_attention` with ``statistic="rms"``.
        norm: [B, Hkv, >= M], of what each value row adds to the layer's output: `projected_norm` through
            `mixkv.hf.output_projection.output_factor`, or the value's own norm.

    Returns: [B, Hkv, M].
    """
    return pool(weights * norm[..., : weights.shape[-1]], _OUTPUT_KERNEL, "max")


class Directions(NamedTuple):
    """What the keys of each head point to: inverse norms [B, Hkv, N], mean unit key [B, Hkv, D], valid keys [B, Hkv]."""

    inverse_norm: torch.Tensor
    mean: torch.Tensor
    count: torch.Tensor


def directions(key: torch.Tensor, valid: torch.Tensor) -> Directions:
    """Reads ``key`` [B, Hkv, N, D] once for `redundancy` and `similarity`; keys that are not valid do not count."""
    real = valid.expand(key.shape[:3])
    inverse_norm = 1 / norm(key).clamp(min=1e-12)
    count = real.sum(dim=-1).float()
    total = ((inverse_norm * real).unsqueeze(2) @ key.float()).squeeze(2)
    return Directions(inverse_norm, total / count.clamp(min=1).unsqueeze(-1), count)


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
    # As a row times a matrix: torch multiplies a matrix by a column several times slower.
    return (found.mean.unsqueeze(2) @ key.float().transpose(-1, -2)).squeeze(2) * found.inverse_norm


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


def combine(
    score: str,
    importance: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor,
    found: Directions,
    redundancy: torch.Tensor,
) -> torch.Tensor:
    """The named score of every candidate.

    Args:
        score: one of `mixkv.registry.score_names`.
        importance: [B, Hkv, M], pooled window attention, or for `config.OUTPUT_SCORES` the `output_importance`.
        key, value: [B, Hkv, N, D].
        valid: bool, broadcasts to [B, Hkv, N].
        found: of ``key``.
        redundancy: [B, Hkv], the share of diversity in ``mix`` and ``mix-output``.

    Returns: [B, Hkv, M] float32, -inf where not valid.
    """
    candidates = importance.shape[-1]
    real = valid[..., :candidates]

    def diversity() -> torch.Tensor:
        return match(-similarity(key, found)[..., :candidates], importance, real)

    def value_norm() -> torch.Tensor:
        return match(norm(value[:, :, :candidates]), importance, real)

    def key_norm() -> torch.Tensor:
        return match(-norm(key[:, :, :candidates]), importance, real)

    if score in registry.registered_scores:
        total = registry.registered_scores[score](importance, key, value, redundancy)
        if total.shape != importance.shape:
            raise ValueError(f"score {score!r} gave {list(total.shape)} numbers for {list(importance.shape)} candidates")
        total = total.float()
        if total.masked_fill(~real, 0.0).isnan().any():
            raise ValueError(f"score {score!r} gave nan: divide by something that cannot be zero")
    elif score in ("attn", "output"):
        total = importance
    elif score == "vnorm":
        total = importance + value_norm()
    elif score == "knorm":
        total = importance + key_norm()
    elif score == "keydiff":
        total = diversity()
    elif score == "mix-fixed":
        total = (diversity() + importance + value_norm()) / 3
    else:
        share = redundancy.unsqueeze(-1)
        total = share * diversity() + (1 - share) * (importance + value_norm())
    return total.masked_fill(~real, -torch.inf)


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
    inverse_norm = 1 / torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32).clamp(min=1e-12)
    count = kinds.sum(dim=-1).float()
    total = (kinds * inverse_norm.unsqueeze(2)) @ key.float()
    found = Directions(inverse_norm, total / count.clamp(min=1).unsqueeze(-1), count)
    return redundancy(found).masked_fill(count == 0, torch.nan)
