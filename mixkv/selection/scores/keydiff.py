"""Keys that differ from the others (KeyDiff, arXiv 2504.15364)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...registry import Score, add

if TYPE_CHECKING:
    from ..context import ScoreContext


def keydiff(context: ScoreContext) -> torch.Tensor:
    """Minus the cosine with the mean direction of the head's keys, on the scale of importance, [B, Hkv, M]."""
    return context.match(-context.similarity)


add(Score("keydiff", keydiff, "diversity alone", "2504.15364"))
