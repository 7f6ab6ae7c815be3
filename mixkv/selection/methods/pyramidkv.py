"""PyramidKV (arXiv 2406.02069): later layers keep fewer."""

from __future__ import annotations

import torch

from ...registry import Method, add
from ..apportion import apportion
from ..context import AllocationContext
from .snapkv import uniform


def pyramid(base: torch.Tensor, candidates: torch.Tensor, *, layer_idx: int, num_layers: int, beta: int) -> torch.Tensor:
    """Falling linearly over the layers (equation 3); the layers of a row sum to L * base.

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


def allocate(context: AllocationContext) -> torch.Tensor:
    return pyramid(
        context.budget,
        context.candidates,
        layer_idx=context.layer_idx,
        num_layers=context.num_layers,
        beta=context.config.pyramid_beta,
    )


add(Method("pyramidkv", allocate, "fewer in later layers", "2406.02069", options=("pyramid_beta",)))
