"""Importance and diversity mixed (MixKV, arXiv 2510.20707)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...ops import dispatch
from ...registry import Score, add

if TYPE_CHECKING:
    from ..context import ScoreContext


def mix(context: ScoreContext) -> torch.Tensor:
    """``r * diversity + (1 - r) * (importance + value norm)`` with the head's redundancy r (equation 7), [B, Hkv, M]."""
    valid = None if context.mask is None else context.valid_candidates
    return dispatch.mix(context.backend, context.importance, context.similarity, context.value_norm, context.redundancy, valid)


def mix_fixed(context: ScoreContext) -> torch.Tensor:
    """The plain mean of diversity, importance and value norm, [B, Hkv, M]."""
    return (context.match(-context.similarity) + context.importance + context.match(context.value_norm)) / 3


add(Score("mix", mix, "importance and diversity in proportion to the head's redundancy", "2510.20707"))
add(Score("mix-fixed", mix_fixed, "plain mean of importance, value norm and diversity", "2510.20707"))
