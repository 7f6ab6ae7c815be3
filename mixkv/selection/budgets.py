"""Budgets: how many candidate rows (window excluded) each KV head keeps. Pure functions with exact totals.

Every function returns int64 [B, Hkv] whose sum over a batch row is exactly what the method owes that row: nothing is lost
to rounding, no head gets more rows than it has candidates, and what one head cannot use goes to the others.
"""

from __future__ import annotations

import numpy as np
import torch

from ..head_profile import Table
from .apportion import apportion, to_device, to_host, total_rows


def uniform(base: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Every head the same (SnapKV, arXiv 2404.14469).

    Args:
        base: [B] int, candidate rows per head on average.
        candidates: [B, Hkv] int, rows to choose from.
    """
    return to_device(_uniform(*to_host(base, candidates)), candidates.device)


def _uniform(base: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    shares = np.broadcast_to(base[:, None], candidates.shape)
    return apportion(shares, total_rows(base, candidates), candidates)


def pyramid(base: torch.Tensor, candidates: torch.Tensor, *, layer_idx: int, num_layers: int, beta: int) -> torch.Tensor:
    """Falling linearly over the layers (PyramidKV, arXiv 2406.02069, equation 3); the layers of a row sum to L * base.

    The first layer's share is ``2 * base - base // beta``, less where the prompt has fewer candidates.
    """
    means, limits = to_host(base, candidates)
    limit = limits.max(axis=-1)
    mean = np.minimum(means, limit).astype(np.float64)
    # At least the mean: a prompt that is shorter than its budget is kept whole.
    top = np.minimum(np.maximum(2 * mean - means // beta, mean), limit)
    bottom = 2 * mean - top
    step = np.arange(num_layers)
    # From either end, so that layers as far from the middle have shares that sum to twice the mean, to the bit.
    width = 1 / max(num_layers - 1, 1)
    steps = np.where(step < num_layers // 2, step * width, 1 - (num_layers - 1 - step) * width)
    shares = top[:, None] + (bottom - top)[:, None] * steps
    if num_layers == 1:
        shares = mean[:, None]
    layers = apportion(shares, (mean * num_layers).astype(np.int64), np.broadcast_to(limit[:, None], shares.shape))
    return to_device(_uniform(layers[:, layer_idx], limits), candidates.device)


def ada(base: torch.Tensor, candidates: torch.Tensor, attention: torch.Tensor, *, floor: float) -> torch.Tensor:
    """Shared out within a layer by attention mass, with a floor (AdaKV, arXiv 2407.11550, algorithm 1).

    The ``Hkv * base`` largest attention scores over all heads, each weighted by its head's share of mass in its top
    ``base``, count for their heads: n_h of them; a head gets ``(1 - floor) * n_h + floor * base``.

    Args:
        attention: [B, Hkv, M] float32, pooled window attention; 0 or -inf for padding.
    """
    batch, heads, length = attention.shape
    if length == 0:
        return candidates.clone()
    means, limits = to_host(base, candidates)
    totals = total_rows(means, limits)
    real = attention.clamp(min=0)
    top = real.topk(min(int(means.max()), length), dim=-1).values
    in_top = torch.arange(top.shape[-1], device=real.device) < base.view(-1, 1, 1)
    concentration = (top * in_top).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1e-30)
    weighted = (real * concentration).masked_fill(attention.isneginf(), -1.0)
    largest = min(int(totals.max()), heads * length)
    owners = weighted.flatten(1).topk(largest, dim=-1).indices // length
    total = (base * heads).minimum(candidates.sum(dim=-1)).unsqueeze(-1)
    counted = (torch.arange(largest, device=real.device) < total).long()
    counts = torch.zeros(batch, heads, dtype=torch.long, device=real.device).scatter_add_(1, owners, counted)
    shares = (1 - floor) * counts.cpu().numpy() + floor * totals[:, None] / heads
    return to_device(apportion(shares, totals, limits), candidates.device)


def from_profile(
    base: torch.Tensor, candidates: torch.Tensor, profile: Table, *, layer_idx: int, num_layers: int, floor: float = 0.1
) -> torch.Tensor:
    """Shared out over the whole model by an offline head profile (SparseMM, arXiv 2506.05344, equation 5).

    A head of layer l gets ``floor * base`` and its share of the rest in proportion to its score.

    Args:
        profile: [num_layers, Hq] (summed over each group) or [num_layers, Hkv].
    """
    batch, heads = candidates.shape
    scores = np.array(profile, dtype=np.float64)
    if scores.shape[0] != num_layers or scores.shape[1] % heads:
        raise ValueError(
            f"profile has shape {list(scores.shape)}, but the model has {num_layers} compressed layers of {heads} KV heads: "
            f"give a table [{num_layers}, query heads] or [{num_layers}, {heads}]"
        )
    scores = scores.reshape(num_layers, heads, -1).sum(-1)
    share = (scores / scores.sum()).flatten()
    means, limits = to_host(base, candidates)
    limit = np.broadcast_to(limits.max(axis=-1, keepdims=True), (batch, share.size))
    total = np.minimum(means * share.size, limit.sum(-1))
    pool = (means * share.size * (1 - floor))[:, None]
    model = apportion(share * pool + floor * means[:, None], total, limit)
    mine = model.reshape(batch, num_layers, heads)[:, layer_idx]
    # Heads of one prompt have equally many candidates; when a cache is compressed again they may not.
    return to_device(apportion(mine, np.minimum(mine.sum(-1), limits.sum(-1)), limits), candidates.device)


def slots(equal: torch.Tensor, rows: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Chunks that heads attend to in a step: each that has any keeps one, the others are shared out in proportion to ``rows``.

    Args:
        equal: [B, H] int, what they have if none gets more than its neighbours, 0 for heads without chunks.
        rows: [B, H] int, rows they would get under `GlobalTopK`.
        limit: [B, H] int, the chunks there are, no fewer than ``equal``.
    """
    device = limit.device
    equal, rows, limit = to_host(equal, rows, limit)
    certain = (equal > 0).astype(np.int64)
    total = (equal - certain).sum(axis=-1)
    # What is added decides only where nobody has any rows.
    weight = (rows + 1e-6) * certain
    shares = total[:, None] * weight / weight.sum(axis=-1, keepdims=True).clip(min=1e-30)
    return to_device(certain + apportion(shares, total, (limit - certain) * certain), device)
