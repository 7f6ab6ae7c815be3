"""Attention of tokens that repeat a part of the context, and the largest weight that each context token gets from them."""

from __future__ import annotations

import torch

# Attention weights of a block of queries, all heads and batch rows together: on a CPU they stay in its cache.
_CPU_WEIGHTS, _WEIGHTS = 1 << 20, 1 << 27


def replay_attention(
    query: torch.Tensor,
    context_key: torch.Tensor,
    context_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    visible: torch.Tensor | None = None,
    scored: torch.Tensor | None = None,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query sees the given tokens of the context, and causally the others of the replay.

    Args:
        query: [B, Hq, n, D] of the replay; Hq a multiple of Hkv.
        context_key, context_value: [B, Hkv, m, D] and [B, Hkv, m, Dv] of the context.
        key, value: [B, Hkv, n, D] and [B, Hkv, n, Dv] of the replay.
        visible: bool [B, m], False for context tokens that nothing sees; None: all are seen.
        scored: bool [B, n], False for queries whose weights do not count; None: all count.
        scaling: factor on the logits.
        softcap: ``softcap * tanh(logits / softcap)`` where the model has it.
        sinks: [Hq] logits that take mass and have no token, where the model has them.

    Returns: the output [B, n, Hq, Dv], and float32 [B, Hkv, m], the largest softmax weight that each context token gets from a
        query of its KV head's group; 0 where no query counts.
    """
    batch, query_heads, new, size = query.shape
    heads, seen = context_key.shape[1:3]
    groups, length = query_heads // heads, seen + new
    keys = torch.cat([context_key, key], dim=2).transpose(-1, -2)
    values = torch.cat([context_value, value], dim=2)
    folded = (query * scaling).view(batch, heads, groups, new, size)
    hidden = None if visible is None else ~visible.view(batch, 1, 1, 1, seen)
    sink = None if sinks is None else sinks.float().view(1, heads, groups, 1, 1)
    output = query.new_empty(batch, new, query_heads, value.shape[-1])
    score = torch.zeros(batch, heads, seen, device=query.device)
    weights = _CPU_WEIGHTS if query.device.type == "cpu" else _WEIGHTS
    block = max(1, weights // (batch * query_heads * length))
    for first in range(0, new, block):
        last = min(first + block, new)
        rows, columns = last - first, seen + last
        queries = folded[:, :, :, first:last].reshape(batch, heads, groups * rows, size)
        logits = (queries @ keys[..., :columns]).float().view(batch, heads, groups, rows, columns)
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        if hidden is not None:
            logits[..., :seen].masked_fill_(hidden, -torch.inf)
        future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
        logits[..., seen + first :].masked_fill_(future, -torch.inf)
        if sink is not None:
            logits = torch.cat([logits, sink.expand(batch, -1, -1, rows, -1)], dim=-1)
        shares = logits.softmax(dim=-1)
        shares = shares[..., :columns]
        part = shares.to(value.dtype).reshape(batch, heads, groups * rows, columns) @ values[:, :, :columns]
        part = part.view(batch, heads * groups, rows, -1)
        output[:, first:last] = part.transpose(1, 2)
        counted = shares[..., :seen]
        if scored is not None:
            counted = counted * scored[:, None, None, first:last, None]
        score = score.maximum(counted.flatten(2, 3).amax(dim=2))
    return output, score
