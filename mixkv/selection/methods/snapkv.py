"""SnapKV (arXiv 2404.14469): every head keeps the same number."""

from __future__ import annotations

import numpy as np
import torch

from ...registry import Method, add
from ..apportion import apportion, to_device, to_host, total_rows
from ..context import AllocationContext


def uniform(base: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Every head the same.

    Args:
        base: [B] int, candidates kept per head on average.
        candidates: [B, Hkv] int, candidates to choose from.
    """
    return to_device(uniform_on_host(*to_host(base, candidates)), candidates.device)


def uniform_on_host(base: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """`uniform` of arrays."""
    if (base[:, None] <= candidates).all():
        return np.broadcast_to(base[:, None], candidates.shape)
    shares = np.broadcast_to(base[:, None], candidates.shape)
    return apportion(shares, total_rows(base, candidates), candidates)


def allocate(context: AllocationContext) -> torch.Tensor:
    return uniform(context.budget, context.candidates)


add(Method("snapkv", allocate, "every head the same", "2404.14469"))
