"""Budgets: how many candidate rows (window excluded) each KV head keeps. Pure functions with exact totals.

Every function returns int64 [B, Hkv] whose sum over a batch row is exactly what the method owes that row: nothing is lost
to rounding, no head gets more rows than it has candidates, and what one head cannot use goes to the others.
"""

from __future__ import annotations

import torch

from ..head_profile import Table
from .apportion import apportion, total_rows


def uniform(base: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Every head the same (SnapKV, arXiv 2404.14469).

    Args:
        base: [B] int, candidate rows per head on average.
        candidates: [B, Hkv] int, rows to choose from.
    """
    shares = base.double().unsqueeze(-1).expand(candidates.shape)
    return apportion(shares, total_rows(base, candidates), candidates)


def pyramid(base: torch.Tensor, candidates: torch.Tensor, *, layer_idx: int, num_layers: int, beta: int) -> torch.Tensor:
    """Falling linearly over the layers (PyramidKV, arXiv 2406.02069, equation 3); the layers of a row sum to L * base.

    The first layer's share is ``2 * base - base // beta``, less where the prompt has fewer candidates.
    """
    limit = candidates.amax(dim=-1).double()
    mean = base.double().minimum(limit)
    top = (2 * mean - (base // beta).double()).minimum(limit)
    bottom = 2 * mean - top
    steps = torch.linspace(0, 1, num_layers, dtype=torch.float64, device=base.device)
    shares = top.unsqueeze(-1) + (bottom - top).unsqueeze(-1) * steps
    if num_layers == 1:
        shares = mean.unsqueeze(-1)
    layers = apportion(shares, (mean * num_layers).long(), limit.unsqueeze(-1).expand_as(shares).long())
    return uniform(layers[:, layer_idx], candidates)


def ada(base: torch.Tensor, candidates: torch.Tensor, attention: torch.Tensor, *, floor: float) -> torch.Tensor:
    """Shared out within a layer by attention mass, with a floor (AdaKV, arXiv 2407.11550, algorithm 1).

    The ``Hkv * base`` largest attention scores over all heads, each weighted by its head's share of mass in its top
    ``base``, vote for their heads: n_h votes; a head gets ``(1 - floor) * n_h + floor * base``.

    Args:
        attention: [B, Hkv, M] float32, pooled window attention; 0 or -inf for padding.
    """
    batch, heads, length = attention.shape
    total = total_rows(base, candidates)
    if length == 0:
        return candidates.clone()
    real = attention.clamp(min=0)
    top = real.topk(min(int(base.max()), length), dim=-1).values
    in_top = torch.arange(top.shape[-1], device=real.device) < base.view(-1, 1, 1)
    concentration = (top * in_top).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1e-30)
    weighted = (real * concentration).masked_fill(attention.isneginf(), -1.0)
    largest = min(int(total.max()), heads * length)
    votes = weighted.flatten(1).topk(largest, dim=-1).indices // length
    counted = (torch.arange(largest, device=real.device) < total.unsqueeze(-1)).double()
    voted = torch.zeros(batch, heads, dtype=torch.float64, device=real.device).scatter_add_(1, votes, counted)
    shares = (1 - floor) * voted + floor * total.double().unsqueeze(-1) / heads
    return apportion(shares, total, candidates)


def from_profile(
    base: torch.Tensor, candidates: torch.Tensor, profile: Table, *, layer_idx: int, num_layers: int, floor: float = 0.1
) -> torch.Tensor:
    """Shared out over the whole model by an offline head profile (SparseMM, arXiv 2506.05344, equation 5).

    A head of layer l gets ``floor * base`` and its share of the rest in proportion to its score.

    Args:
        profile: [num_layers, Hq] (summed over each group) or [num_layers, Hkv].
    """
    batch, heads = candidates.shape
    scores = torch.tensor(profile, dtype=torch.float64, device=base.device)
    if scores.shape[0] != num_layers or scores.shape[1] % heads:
        raise ValueError(
            f"profile has shape {list(scores.shape)}, but the model has {num_layers} compressed layers of {heads} KV heads: "
            f"give a table [{num_layers}, query heads] or [{num_layers}, {heads}]"
        )
    scores = scores.view(num_layers, heads, -1).sum(-1)
    share = (scores / scores.sum()).flatten()
    limit = candidates.amax(dim=-1, keepdim=True).expand(batch, share.numel())
    total = (base * share.numel()).minimum(limit.sum(-1))
    pool = (base.double() * share.numel() * (1 - floor)).unsqueeze(-1)
    model = apportion(share * pool + floor * base.double().unsqueeze(-1), total, limit)
    mine = model.view(batch, num_layers, heads)[:, layer_idx]
    # Heads of one prompt have equally many candidates; when a cache is compressed again they may not.
    return apportion(mine.double(), mine.sum(-1).minimum(candidates.sum(-1)), candidates)


def slots(equal: torch.Tensor, rows: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Chunks that heads attend to in a step: each that has any keeps one, the others are shared out in proportion to ``rows``.

    Args:
        equal: [B, H] int, what they have if none gets more than its neighbours, 0 for heads without chunks.
        rows: [B, H] int, rows they would get under `Votes`.
        limit: [B, H] int, the chunks there are, no fewer than ``equal``.
    """
    certain = (equal > 0).long()
    total = (equal - certain).sum(dim=-1)
    # What is added decides only where nobody has votes.
    weight = (rows.double() + 1e-6) * certain
    shares = total.unsqueeze(-1) * weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return certain + apportion(shares, total, (limit - certain) * certain)
