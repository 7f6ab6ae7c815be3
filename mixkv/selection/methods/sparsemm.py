"""SparseMM (arXiv 2506.05344): heads keep as many as an offline profile of the model's heads says."""

from __future__ import annotations

import torch

from ...head_profile import Table
from ...registry import Method, add
from ..apportion import apportion
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


def allocate(context: AllocationContext) -> torch.Tensor:
    return from_profile(
        context.budget,
        context.candidates,
        context.config.profile,
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
