"""How much a replay of the prompt is expected to need each row, from what is stored of it: without a replay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...registry import Score, add
from ..context import FIRST
from ..gate import predict

if TYPE_CHECKING:
    from ..context import ScoreContext


def gate(context: ScoreContext) -> torch.Tensor:
    """The predicted largest attention weight of each candidate while the prompt is repeated, [B, Hkv, M]; 1 for the first four.

    Raises:
        ValueError: there is no gate for the layer.
    """
    if context.measured.gate is None:
        raise ValueError(
            "score='gate' needs a gate that was fitted to the model: use a MixKVCache of the model, or mixkv.patch"
        )
    count = context.num_candidates
    found = predict(context.key[:, :, :count], context.value[:, :, :count], context.measured.gate)
    if context.mask is None:
        return torch.cat([torch.ones_like(found[..., :FIRST]), found[..., FIRST:]], dim=-1)
    first = context.valid_candidates.cumsum(dim=-1) <= FIRST
    return found.masked_fill(first, 1.0)


def gate_output(context: ScoreContext) -> torch.Tensor:
    """The larger of what a replay and what the window's queries need of each candidate, [B, Hkv, M]: for a question that is known.

    The first is `gate`, the second output importance as a share of the largest in the layer.

    Raises:
        ValueError: there is no gate for the layer.
    """
    importance = context.output_importance
    largest = importance.flatten(1).amax(dim=-1).clamp(min=1e-30) if importance.shape[-1] else importance.new_ones(1)
    return torch.maximum(gate(context), importance / largest.view(-1, 1, 1))


add(Score("gate", gate, "what a replay is expected to attend to, from keys and values", comparable=True, needs_gate=True))
add(
    Score(
        "gate-output",
        gate_output,
        "the larger of gate and of output importance as a share of the layer's largest",
        comparable=True,
        needs_gate=True,
    )
)
