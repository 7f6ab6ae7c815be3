"""What the model attends to when it repeats the prompt (KVzip, arXiv 2505.23416): for questions that come later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...registry import Score, add

if TYPE_CHECKING:
    from ..context import ScoreContext


def replay(context: ScoreContext) -> torch.Tensor:
    """The largest attention weight of each candidate while the prompt is repeated, [B, Hkv, M].

    Raises:
        ValueError: no replay was measured.
    """
    if context.measured.replay is None:
        raise ValueError(
            "score='replay' needs a replay of the prompt: read it with mixkv.read, or by a MixKVCache of the model"
        )
    return context.measured.replay[..., : context.num_candidates]


add(Score("replay", replay, "attention while the prompt is repeated", "2505.23416", comparable=True, needs_replay=True))
