"""Importance: what the observation window attends to, and how much that adds to the layer's output."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pool(attention: torch.Tensor, kernel_size: int, pooling: str) -> torch.Tensor:
    """1-D pooling over neighbouring candidates, same length; the zeros beyond both ends count in the average.

    Args:
        attention: [B, Hkv, M], non-negative.

    Returns: [B, Hkv, M].
    """
    if attention.shape[-1] == 0:
        return attention
    operation = F.max_pool1d if pooling == "max" else F.avg_pool1d
    return operation(attention, kernel_size, stride=1, padding=kernel_size // 2)


# The pooling width of `output_importance` in the published results.
OUTPUT_KERNEL = 9


def output_importance(weights: torch.Tensor, norm: torch.Tensor, kernel_size: int = OUTPUT_KERNEL) -> torch.Tensor:
    """What the window takes out of each row, in units of the residual stream: comparable across heads and layers.

    The root mean square of its weights favours what *some* window query needs much over what all need a little; pooling
    keeps the neighbours of a peak.

    Args:
        weights: [B, Hkv, M], `window_attention` with ``statistic="rms"``.
        norm: [B, Hkv, >= M], of what each value row adds to the layer's output: `projected_norm` through
            `mixkv.hf.output_projection.output_factor`, or the value's own norm.
        kernel_size: neighbours that share the importance of a peak.

    Returns: [B, Hkv, M].
    """
    return pool(weights * norm[..., : weights.shape[-1]], kernel_size, "max")
