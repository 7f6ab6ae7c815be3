"""Scores: one number per candidate row and KV head, higher is kept. Pure functions, float32 throughout.

Shapes: B batch rows, Hq query heads, Hkv KV heads, G = Hq // Hkv, N prompt columns, W window columns (the last ones),
M = N - W candidate columns, D head size. ``valid`` is a bool tensor that broadcasts to [B, Hkv, N]; a column that is not
valid (padding) is never counted and scores -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    *,
    scaling: float,
    statistic: str = "mean",
    group_reduce: str = "mean",
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the window's queries attend to, before pooling (SnapKV, arXiv 2404.14469, equation 5).

    Every window query sees all candidates and, causally, the window; the softmax runs over all N columns, so the
    window's own mass stays in the denominator.

    Args:
        query: [B, Hq, W, D], the window's queries, rotated as the model uses them.
        key: [B, Hkv, N, D].
        valid: bool, broadcasts to [B, Hkv, N]; None: all columns are valid.
        scaling: factor on the logits.
        statistic: ``mean`` or ``rms`` (root mean square) over the window's queries.
        group_reduce: ``mean`` or ``max`` over the G query heads of a KV head.
        softcap: ``softcap * tanh(logits / softcap)`` where the model has it.
        sinks: [Hq] logits that take mass and hold no row, where the model has them.

    Returns: [B, Hkv, M] float32, the statistic over the window's queries, reduced over the group.
    """
    batch, query_heads, window, size = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    groups = query_heads // kv_heads
    folded = (query.float() * scaling).reshape(batch, kv_heads, groups * window, size)
    logits = (folded @ key.float().transpose(-1, -2)).view(batch, kv_heads, groups, window, length)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    future = torch.ones(window, window, dtype=torch.bool, device=key.device).triu(1)
    logits[..., length - window :].masked_fill_(future, -torch.inf)
    if valid is not None:
        logits.masked_fill_(~valid[:, :, None, None, :], -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, kv_heads, groups, 1, 1).expand(batch, -1, -1, window, 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(dim=-1)[..., : length - window]
    mass = weights.square().mean(dim=3).sqrt() if statistic == "rms" else weights.mean(dim=3)
    mass = mass.amax(dim=2) if group_reduce == "max" else mass.mean(dim=2)
    # A window query that is padding itself sees nothing: its softmax is 0/0, in a row without candidates.
    return mass if valid is None else mass.nan_to_num(0.0)


def norm(rows: torch.Tensor) -> torch.Tensor:
    """Norms [...] of rows [..., D], float32."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)


def projected_norm(value: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Norm of each value after a linear map of its head's.

    Args:
        value: [B, Hkv, N, D].
        factor: [Hkv, outputs, D] float32.

    Returns: [B, Hkv, N] float32.
    """
    return norm(value.float() @ factor.transpose(-1, -2))


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


BUILT_IN = ("mix", "mix-fixed", "attn", "vnorm", "knorm", "keydiff", "output", "mix-output")

# Neighbours that share the importance of a peak in `output_importance`.
_OUTPUT_KERNEL = 9


def output_importance(weights: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """What the window takes out of each row, in units of the residual stream: comparable across heads and layers.

    The root mean square of its weights favours what *some* window query needs much over what all need a little; pooling
    keeps the neighbours of a peak.

    Args:
        weights: [B, Hkv, M], `window_attention` with ``statistic="rms"``.
        norm: [B, Hkv, >= M], of what each value row adds to the layer's output: `projected_norm` through
            `mixkv.projection.output_factor`, or the value's own norm.

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


# A score of the user's: attention, key, value, redundancy in, one number per candidate out; see `register`.
Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_registered: dict[str, Score] = {}


def register(name: str, function: Score) -> None:
    """Makes ``MixKVConfig(score=name)`` keep the rows for which ``function`` is highest.

    Args:
        name: of the score; registering it again replaces it.
        function: ``function(attention, key, value, redundancy) -> score``, with attention [B, Hkv, M] (pooled window attention,
            float32), key [B, Hkv, N, D] (float32), value [B, Hkv, N, Dv], redundancy [B, Hkv] and score [B, Hkv, M]; the
            candidates are the first M columns, the window the rest. Padding is taken care of.

    Raises:
        ValueError: the name is one of the library's own.
    """
    if name in BUILT_IN:
        raise ValueError(f"score {name!r} is built in: take another name")
    _registered[name] = function


def names() -> tuple[str, ...]:
    """The scores there are: the library's own and those registered."""
    return *BUILT_IN, *_registered


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
        score: one of `names`.
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

    if score in _registered:
        total = _registered[score](importance, key, value, redundancy)
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
