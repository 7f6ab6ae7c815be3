"""Sparsity of heads: how much of their attention rests on tokens that are always kept. `mixkv.selection.hybrid` prunes by it."""

from __future__ import annotations

import torch

# Queries whose attention is in memory at once.
_QUERIES = 8


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
    *,
    first: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The share of a head's attention that rests on the few tokens that are kept anyway: the first ones and the window's.

    Of the query heads that share a KV head, the one that attends to other tokens most counts.

    Args:
        query: [B, Hq, W, D], the last ones.
        key: [B, Hkv, N, D].
        scoring: bool [B, W], the queries that count, at least one for each batch row: `scoring_queries`.
        valid: bool [B, N], False for padding on the left.
        first: how many of the prompt's first tokens.
        scaling, softcap, sinks: as in the model; attention to a sink counts as attention to these tokens.

    Returns: float32 [B, Hkv], from 0 to 1.
    """
    batch, query_heads, window, size = query.shape
    heads, length = key.shape[1], key.shape[2]
    keys = key.float().transpose(-1, -2)
    positions = torch.arange(length, device=key.device)
    real = torch.ones(1, length, dtype=torch.bool, device=key.device) if valid is None else valid
    others = (real.cumsum(dim=-1) > first) & (positions < length - window)
    found = []
    for start in range(0, window, _QUERIES):
        part = query[:, :, start : start + _QUERIES].float() * scaling
        count = part.shape[2]
        logits = (part.reshape(batch, heads, -1, size) @ keys).view(batch, heads, -1, count, length)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        seen = positions <= (length - window + start + torch.arange(count, device=key.device)).unsqueeze(-1)
        seen = seen & real.unsqueeze(1)
        logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
        if sinks is not None:
            extra = sinks.float().view(1, heads, -1, 1, 1).expand(batch, -1, -1, count, 1)
            logits = torch.cat([logits, extra], dim=-1)
        weights = logits.softmax(dim=-1)[..., :length]
        found.append((weights * others[:, None, None, None]).sum(dim=-1).amax(dim=2))
    counted = scoring.unsqueeze(1)
    drawn = torch.cat(found, dim=-1).masked_fill(~counted, 0.0)
    return 1 - drawn.sum(dim=-1) / counted.sum(dim=-1)
