"""Which share of KV heads holds a column."""

from __future__ import annotations

import torch


def share(heads: list[torch.Tensor], columns: int) -> torch.Tensor:
    """For each of the first ``columns`` columns the share of ``heads`` (columns held, a tensor each): float32 [columns]."""
    total = torch.zeros(columns)
    for positions in heads:
        total[positions[positions < columns].cpu().long()] += 1
    return total / len(heads)
