"""What the observation window attends to (SnapKV, arXiv 2404.14469), alone or with the norm of the value or of the key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...registry import Score, add

if TYPE_CHECKING:
    from ..context import ScoreContext


def attn(context: ScoreContext) -> torch.Tensor:
    """Pooled window attention, [B, Hkv, M]."""
    return context.importance


def vnorm(context: ScoreContext) -> torch.Tensor:
    """Large values count more, [B, Hkv, M]."""
    return context.importance + context.match(context.value_norm)


def knorm(context: ScoreContext) -> torch.Tensor:
    """Large keys count less, [B, Hkv, M]."""
    return context.importance + context.match(-context.key_norm)


add(Score("attn", attn, "window attention", "2404.14469"))
add(Score("vnorm", vnorm, "window attention plus value norm"))
add(Score("knorm", knorm, "window attention minus key norm"))
