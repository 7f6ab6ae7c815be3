"""AdaKV (arXiv 2407.11550): the heads of a layer keep as many as their importance asks for."""

from __future__ import annotations

import torch

from ...ops import dispatch
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
    heads, length = importance.shape[1:]
    if length == 0:
        return candidates.clone()
    means, limits = to_host(base, candidates)
    totals = total_rows(means, limits)
    counts = dispatch.ada_counts(importance, base, to_device(totals, base.device))
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
