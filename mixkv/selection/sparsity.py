"""Sparsity of heads: how much of their attention rests on tokens that are always kept. `mixkv.selection.hybrid` prunes by it."""

from __future__ import annotations

import torch

from ..ops import score_reference
from ..ops.arguments import LogitOptions


def scoring_queries(
    batch: int, window: int, image: torch.Tensor | None, valid: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """The text-centric queries of the window: text after the last image token; all real ones where there are none.

    Returns: bool [B, W].
    """
    real = torch.ones(batch, window, dtype=torch.bool, device=device) if valid is None else valid[:, -window:]
    if image is None:
        return real
    later_images = image[:, -window:].flip(-1).cumsum(-1).flip(-1)
    text = real & (later_images == 0)
    return torch.where(text.any(dim=-1, keepdim=True), text, real)


def sparsity(
    query: torch.Tensor,
    key: torch.Tensor,
    scoring: torch.Tensor,
    valid: torch.Tensor | None,
    logits: LogitOptions,
    *,
    first: int,
) -> torch.Tensor:
    """The share of a head's attention that rests on the few tokens that are kept anyway: the first ones and the window's.

    Of the query heads that share a KV head, the one that attends to other tokens most counts.

    Args:
        query: [B, Hq, W, D], the last ones.
        key: [B, Hkv, N, D].
        scoring: bool [B, W], the queries that count, at least one for each batch row: `scoring_queries`.
        valid: bool [B, N], False for padding on the left.
        logits: as in the model; attention to a sink counts as attention to the tokens that are kept.
        first: how many of the prompt's first tokens.

    Returns: float32 [B, Hkv], from 0 to 1.
    """
    length, window = key.shape[2], query.shape[2]
    positions = torch.arange(length, device=key.device)
    real = torch.ones(1, length, dtype=torch.bool, device=key.device) if valid is None else valid
    others = (real.cumsum(dim=-1) > first) & (positions < length - window)
    mask = None if valid is None else valid.unsqueeze(1)
    found = score_reference.attention_share(query, key, mask, others.unsqueeze(1), logits).amax(dim=2)
    counted = scoring.unsqueeze(1)
    return 1 - found.masked_fill(~counted, 0.0).sum(dim=-1) / counted.sum(dim=-1)
