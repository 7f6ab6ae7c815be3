"""AdaKV (arXiv 2407.11550): the heads of a layer keep as many as their importance asks for."""

from __future__ import annotations

import torch

from ...registry import Method, add
from ..apportion import apportion, to_device, to_host, total_rows
from ..context import AllocationContext


def ada(base: torch.Tensor, candidates: torch.Tensor, importance: torch.Tensor, *, floor: float) -> torch.Tensor:
    """Allocated within a layer by importance, with a floor (algorithm 1).

    n_h of the ``Hkv * base`` most important candidates over all heads, each weighted by the share of importance in its head's
    top ``base``, belong to head h, which gets ``(1 - floor) * n_h + floor * base``.

    Args:
        base: [B] int, candidates kept per head on average.
        candidates: [B, Hkv] int, candidates to choose from.
        importance: [B, Hkv, M] float32, such as pooled window attention; 0 or -inf for padding.
    """
    batch, heads, length = importance.shape
    if length == 0:
        return candidates.clone()
    means, limits = to_host(base, candidates)
    totals = total_rows(means, limits)
    real = importance.clamp(min=0)
    top = real.topk(min(int(means.max()), length), dim=-1).values
    in_top = torch.arange(top.shape[-1], device=real.device) < base.to(real.device).view(-1, 1, 1)
    concentration = (top * in_top).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1e-30)
    weighted = (real * concentration).masked_fill(importance.isneginf(), -1.0)
    largest = min(int(totals.max()), heads * length)
    owners = weighted.flatten(1).topk(largest, dim=-1).indices // length
    counted = (torch.arange(largest, device=real.device) < to_device(totals, real.device)[:, None]).long()
    counts = torch.zeros(batch, heads, dtype=torch.long, device=real.device).scatter_add_(1, owners, counted)
    shares = (1 - floor) * counts.cpu().numpy() + floor * totals[:, None] / heads
    return to_device(apportion(shares, totals, limits), candidates.device)


def allocate(context: AllocationContext) -> torch.Tensor:
    return ada(context.budget, context.candidates, context.importance, floor=context.config.ada_floor)


add(
    Method(
        "adakv",
        allocate,
        "within a layer by importance",
        "2407.11550",
        options=("ada_floor",),
        uses_importance=True,
    )
)
