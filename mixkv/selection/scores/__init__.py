"""Scores: one number per candidate row and KV head, higher is kept. Pure functions, float32 throughout.

Shapes: B batch rows, Hq query heads, Hkv KV heads, G = Hq // Hkv, N prompt columns, W window columns (the last ones),
M = N - W candidate columns, D head size. ``valid`` is a bool tensor that broadcasts to [B, Hkv, N]; a column that is not
valid (padding) is never counted and scores -inf.
"""

from __future__ import annotations

import torch

from ... import registry
from ...ops.score_reference import norm
from .diversity import Directions, directions, modal_redundancy, redundancy, similarity
from .importance import output_importance, pool


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


__all__ = [
    "Directions",
    "combine",
    "directions",
    "match",
    "modal_redundancy",
    "output_importance",
    "pool",
    "redundancy",
    "similarity",
]
