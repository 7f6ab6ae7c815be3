"""Global top-k: the heads of all layers keep what adds most to the layers' outputs, prompt by prompt."""

from __future__ import annotations

import numpy as np
import torch

from ...config import MixKVConfig
from ...registry import Method, add
from ..context import AllocationContext
from ..global_budget import GlobalBudget, layer_exponent
from .adakv import ada


def allocate(context: AllocationContext) -> torch.Tensor:
    """Within one layer, where there are no others to compare with: like ``adakv``."""
    return ada(context.budget, context.candidates, context.importance, floor=context.config.global_floor)


def new_budget(config: MixKVConfig, num_layers: int, patient: bool = False, limits: np.ndarray | None = None) -> GlobalBudget:
    """The budget that the layers of one prompt share."""
    return GlobalBudget(num_layers, config.global_floor, layer_exponent(config), patient=patient, limits=limits)


add(
    Method(
        "global",
        allocate,
        "over the whole model, prompt by prompt, by what entries add to the layers' outputs",
        new_budget=new_budget,
        options=("global_floor", "layer_exponent", "threshold"),
        uses_importance=True,
        uses_output_importance=True,
        follows_threshold=True,
    )
)
