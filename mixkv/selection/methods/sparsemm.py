"""SparseMM (arXiv 2506.05344): heads keep as many as an offline profile of the model's heads says."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from ...head_profile import Table
from ...registry import Method, add
from ..apportion import apportion, to_device, to_host
from ..context import AllocationContext


def from_profile(
    base: torch.Tensor, candidates: torch.Tensor, profile: Table, *, layer_idx: int, num_layers: int, floor: float
) -> torch.Tensor:
    """Allocated over the whole model by an offline head profile (equation 5).

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


def allocate(context: AllocationContext) -> torch.Tensor:
    return from_profile(
        context.budget,
        context.candidates,
        cast(Table, context.config.profile),
        layer_idx=context.layer_idx,
        num_layers=context.num_layers,
        floor=context.config.sparsemm_floor,
    )


add(
    Method(
        "sparsemm",
        allocate,
        "over the whole model by an offline head profile",
        "2506.05344",
        options=("profile", "sparsemm_floor"),
        needs_profile=True,
    )
)
