"""The operations that scores are made of in plain torch: the ground truth for every other back end, and the fallback."""

from __future__ import annotations

import torch


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
