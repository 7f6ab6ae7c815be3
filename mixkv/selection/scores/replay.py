"""What the model attends to when it repeats the prompt (KVzip, arXiv 2505.23416): for questions that come later.

Where the question is known, it is in the observation window, whose attention is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...registry import Score, add

# The weight of the window's attention.
_WINDOW = 8.0

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


def replay_window(context: ScoreContext) -> torch.Tensor:
    """`replay`, and several times the largest attention weight of the window's queries, [B, Hkv, M].

    A replay has as many queries as the prompt has tokens, and the window few: what counts is that both come into the budget.
    """
    return replay(context) + _WINDOW * context.largest_attention


add(Score("replay", replay, "attention while the prompt is repeated", "2505.23416", comparable=True, needs_replay=True))
add(
    Score(
        "replay-window",
        replay_window,
        "attention while the prompt is repeated plus the window's",
        comparable=True,
        needs_replay=True,
    )
)
