"""Attention of tokens that repeat a part of the context, and the largest weight that each context token gets from them."""

from __future__ import annotations

import torch

# Attention weights of a block of queries: on a CPU of one head, so that they stay in its cache; elsewhere of all heads.
_CPU_WEIGHTS, _WEIGHTS = 1 << 18, 1 << 27
_HEAD_BY_HEAD = ("cpu",)


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
    batch, query_heads, new, _ = query.shape
    heads, seen = context_key.shape[1:3]
    groups = query_heads // heads
    query = query * scaling
    keys = torch.cat([context_key, key], dim=2).transpose(-1, -2)
    values = torch.cat([context_value, value], dim=2)
    hidden = None if visible is None else ~visible
    output = query.new_empty(batch, new, query_heads, value.shape[-1])
    score = torch.zeros(batch, heads, seen, device=query.device)
    if query.device.type not in _HEAD_BY_HEAD:
        folded = query.view(batch, heads, groups, new, -1)
        sink = None if sinks is None else sinks.view(1, heads, groups, 1, 1)
        hidden = None if hidden is None else hidden[:, None, None, None]
        counted = None if scored is None else scored[:, None, None, :, None]
        part = output.view(batch, new, heads, groups, -1).permute(0, 2, 3, 1, 4)
        _attend(folded, keys[:, :, None], values[:, :, None], part, score, hidden, counted, softcap, sink, _WEIGHTS)
        return output, score
    for row in range(batch):
        counted = None if scored is None else scored[row, :, None]
        for head in range(query_heads):
            own, sink = head // groups, None if sinks is None else sinks[head].view(1, 1)
            part, best = output[row, :, head], score[row, own]
            parts = query[row, head], keys[row, own], values[row, own], part, best
            _attend(*parts, None if hidden is None else hidden[row], counted, softcap, sink, _CPU_WEIGHTS)
    return output, score


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    score: torch.Tensor,
    hidden: torch.Tensor | None,
    counted: torch.Tensor | None,
    softcap: float | None,
    sink: torch.Tensor | None,
    weights: int,
) -> None:
    """Fills ``output`` [..., n, Dv] and raises ``score`` [..., m], in blocks of queries with so many ``weights``.

    query [..., n, D], keys [..., D, m + n] and values [..., m + n, Dv] of one head, or of all with the dimensions of the batch, of KV
    heads and of their groups before them; ``score`` has no dimension of groups.
    """
    new, length = query.shape[-2], values.shape[-2]
    seen = length - new
    rows = min(new, max(1, weights // (query.shape[:-2].numel() * length)))
    future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    single = query.ndim == 2
    # Memory for the blocks of one head is taken once: fresh pages would take longer than the products.
    space = torch.empty(2, rows * (length + 1) if single else 0, dtype=query.dtype, device=query.device)
    for first in range(0, new, rows):
        last = min(first + rows, new)
        count, columns = last - first, seen + last
        buffers = [part[: count * columns].view(count, columns) for part in space] if single else [None, None]
        logits = torch.matmul(query[..., first:last, :], keys[..., :columns], out=buffers[0]).float()
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        if hidden is not None:
            logits[..., :seen].masked_fill_(hidden, -torch.inf)
        logits[..., seen + first :].masked_fill_(future[:count, :count], -torch.inf)
        if sink is not None:
            logits = torch.cat([logits, sink.float().expand(*logits.shape[:-1], 1)], dim=-1)
        own = buffers[1] if sink is None and query.dtype == torch.float32 else None
        shares = torch.softmax(logits, dim=-1, out=own)[..., :columns]
        output[..., first:last, :] = shares.to(values.dtype) @ values[..., :columns, :]
        best = shares[..., :seen]
        counts = None if counted is None else counted[..., first:last, :]
        # Nearly all do: on a CPU it is worth a look.
        if counts is not None and not (single and counts.all()):
            best = best * counts
        best = best.amax(dim=-2)
        score.copy_(score.maximum(best if single else best.amax(dim=2)))
