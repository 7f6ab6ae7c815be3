"""SnapKV (arXiv 2404.14469): every head keeps the same number."""

from __future__ import annotations

import torch

from ...registry import Method, add
from ..apportion import apportion, total_rows
from ..context import AllocationContext


def uniform(base: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Every head the same.

    Args:
        base: [B] int, candidates kept per head on average.
        candidates: [B, Hkv] int, candidates to choose from.
    """
    shares = base.double().unsqueeze(-1).expand(candidates.shape)
    return apportion(shares, total_rows(base, candidates), candidates)


def allocate(context: AllocationContext) -> torch.Tensor:
    return uniform(context.budget, context.candidates)


add(Method("snapkv", allocate, "every head the same", "2404.14469"))
