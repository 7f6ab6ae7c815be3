"""The share of KV heads that keep a token."""

from __future__ import annotations

import torch


def share(heads: list[torch.Tensor], length: int) -> torch.Tensor:
    """The share of heads that keep each of the first ``length`` positions, float32 [length].

    Args:
        heads: for each head a tensor of the positions that it keeps.
    """
    total = torch.zeros(length)
    for positions in heads:
        total[positions[positions < length].cpu().long()] += 1
    return total / len(heads)
