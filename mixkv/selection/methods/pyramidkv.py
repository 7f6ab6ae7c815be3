"""PyramidKV (arXiv 2406.02069): later layers keep fewer."""

from __future__ import annotations

import numpy as np
import torch

from ...registry import Method, add
from ..apportion import apportion, to_device, to_host
from ..context import AllocationContext
from .snapkv import uniform_on_host


def pyramid(base: torch.Tensor, candidates: torch.Tensor, *, layer_idx: int, num_layers: int, beta: int) -> torch.Tensor:
    """Falling linearly over the layers (equation 3); the layers of a row sum to L * base.

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
    return to_device(uniform_on_host(layers[:, layer_idx], limits), candidates.device)


def allocate(context: AllocationContext) -> torch.Tensor:
    return pyramid(
        context.budget,
        context.candidates,
        layer_idx=context.layer_idx,
        num_layers=context.num_layers,
        beta=context.config.pyramid_beta,
    )


add(Method("pyramidkv", allocate, "fewer in later layers", "2406.02069", options=("pyramid_beta",)))
