"""What a budget is in entries per head: given as entries, as a share of the prompt, in bytes, or by a threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import registry
from ..byte_budget import AUTO, parse_bytes

if TYPE_CHECKING:
    from ..config import MixKVConfig

# Of a row's position in the sequence, which a compressed cache stores with its key and its value.
POSITION_BYTES = 4


def base_entries(
    config: MixKVConfig, length: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, heads: int, num_layers: int
) -> torch.Tensor:
    """Candidates kept per head on average, window left out.

    Args:
        length: int64 [B], real tokens.
        key, value: [..., D], [..., Dv], the layer's.
        heads: KV heads of the layer.
        num_layers: compressed layers of the model; a budget in bytes is divided by them.

    Returns: int64 [B]; a share of the prompt is rounded to the nearest entry, what bytes suffice for is rounded down. With a
        threshold, by which each head's number depends on its scores, 0: none is kept for certain.

    Raises:
        ValueError: the bytes do not suffice for the window.
    """
    if config.budget == AUTO:
        return torch.zeros_like(length)
    if isinstance(config.budget, str):
        return _of_bytes(config, config.budget, length, key, value, heads * num_layers)
    if isinstance(config.budget, float):
        entries = [round(tokens * config.budget) - config.window for tokens in length.tolist()]
        return torch.tensor(entries, device=length.device).clamp(min=0)
    return torch.full_like(length, max(config.budget - config.window, 0))


def entries_above(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """How many of the scores [B, Hkv, M] of each head exceed ``threshold``: int64 [B, Hkv]; -inf (padding) never does."""
    return (scores > threshold).sum(dim=-1)


def _of_bytes(
    config: MixKVConfig, budget: str, length: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    sizes = (key.shape[-1], value.shape[-1], key.element_size())
    full = (sizes[0] + sizes[1]) * sizes[2]
    chosen = registry.row_format(config.rows)
    selected, recent = (bytes_of(*sizes) + POSITION_BYTES for bytes_of in (chosen.row_bytes, chosen.recent_bytes))
    size, share = parse_bytes(budget)
    entries = []
    for tokens in length.tolist():
        mine = share * tokens * full if size is None else size / heads
        fixed = min(tokens, config.window) * recent
        if mine < fixed:
            raise ValueError(
                f"budget={budget!r} is {int(mine * heads):,} bytes for each prompt, and the last {config.window} tokens, which "
                f"are always kept, take {fixed * heads:,}: raise the budget, or lower window"
            )
        entries.append(int((mine - fixed) // selected))
    return torch.tensor(entries, device=length.device)
