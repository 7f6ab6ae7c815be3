"""The operations that scores are made of in plain torch: the ground truth for every other back end, and the fallback.

They read keys and values in blocks of tokens, in the dtype that these have, and convert a block at a time to float32: what a
block needs is a small share of the layer's keys and values, however long the prompt is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .arguments import LogitOptions
from .mixing_reference import pool

# Numbers of a head that a block may take whatever the prompt's length: a short prompt is one block.
_NUMBERS = 1 << 16
# A block's float32 copies take at most this share of the bytes of the layer's keys and values.
_SHARE = 1 / 16

# For tokens first .. last: logits [B, Hkv, G, W, last - first].
Logits = Callable[[int, int], torch.Tensor]


def token_blocks(rows: torch.Tensor, numbers: int) -> list[tuple[int, int]]:
    """Blocks of tokens, ``(first, last)`` in order, that end where the prompt ends; the first may be shorter than the others.

    Counted from the end, a prompt has the same blocks with padding on its left as without.

    Args:
        rows: [B, Hkv, N, D], what is read in blocks.
        numbers: float32 numbers that a token of a head needs at once.
    """
    length, size = rows.shape[2:]
    block = max(1, int(max(_NUMBERS, _SHARE * 2 * length * size * rows.element_size() / 4) / numbers))
    ends = range(length, 0, -block)
    return [(max(end - block, 0), end) for end in reversed(ends)]


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    logits: LogitOptions,
    *,
    statistic: str = "mean",
    group_reduce: str = "mean",
) -> torch.Tensor:
    """What the window's queries attend to, before pooling (SnapKV, arXiv 2404.14469, equation 5).

    Every window query sees all candidates and, causally, the window; the softmax runs over all N tokens, so the
    window's own mass stays in the denominator.

    Args:
        query: [B, Hq, W, D], the window's queries, rotated as the model uses them.
        key: [B, Hkv, N, D].
        valid: bool, broadcasts to [B, Hkv, N]; None: all tokens are valid.
        logits: as in the model.
        statistic: ``mean``, ``rms`` (root mean square) or ``max`` over the window's queries.
        group_reduce: ``mean`` or ``max`` over the G query heads of a KV head.

    Returns: [B, Hkv, M] float32, the statistic over the window's queries, reduced over the group.
    """
    candidates = key.shape[2] - query.shape[2]
    if candidates == 0:
        return torch.zeros(*key.shape[:2], 0, device=key.device)
    parts = []
    for _, weights in _weights(query, key, valid, logits, candidates):
        if statistic == "max":
            mass = weights.amax(dim=3)
        else:
            mass = weights.square().mean(dim=3).sqrt_() if statistic == "rms" else weights.mean(dim=3)
        parts.append(mass.amax(dim=2) if group_reduce == "max" else mass.mean(dim=2))
    mass = torch.cat(parts, dim=-1)
    # A window query that is padding itself sees nothing: its softmax is 0/0, in a row without candidates.
    return mass if valid is None else mass.nan_to_num_(0.0)


def importance(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    logits: LogitOptions,
    *,
    group_reduce: str = "mean",
    kernel_size: int,
    pooling: str,
    value: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    attend: Callable[..., torch.Tensor] = window_attention,
) -> torch.Tensor:
    """Pooled `window_attention`: its mean; with ``value`` its root mean square times the norm of what it takes.

    Args:
        query, key, valid, logits, group_reduce: as in `window_attention`.
        kernel_size, pooling: as in `mixing_reference.pool`.
        value: [B, Hkv, N, Dv].
        factor: [Hkv, outputs, Dv] float32, what values are multiplied by before their norms are taken; None: nothing.
        attend: `window_attention`, of whatever back end.

    Returns: [B, Hkv, M] float32.
    """
    found = attend(query, key, valid, logits, statistic="mean" if value is None else "rms", group_reduce=group_reduce)
    if value is not None:
        size = norm(value) if factor is None else projected_norm(value, factor)
        found = found * size[..., : found.shape[-1]]
    return pool(found, kernel_size, pooling)


def attention_share(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    tokens: torch.Tensor,
    logits: LogitOptions,
) -> torch.Tensor:
    """The share of its attention that each of the window's queries gives to some ``tokens``.

    Args:
        query, key, valid, logits: as in `window_attention`.
        tokens: bool, broadcasts to [B, Hkv, N].

    Returns: [B, Hkv, G, W] float32, 0 for a query that sees nothing.
    """
    share = torch.zeros((), device=query.device)
    for (first, last), weights in _weights(query, key, valid, logits, key.shape[2]):
        share = share + weights.mul_(tokens[:, :, None, None, first:last]).sum(dim=-1)
    return share.nan_to_num_(0.0)


class Directions(NamedTuple):
    """What the keys of each head point to: inverse norms [B, Hkv, N], mean unit key [B, Hkv, D], valid keys [B, Hkv]; float32."""

    inverse_norm: torch.Tensor
    mean: torch.Tensor
    count: torch.Tensor


def directions(key: torch.Tensor, valid: torch.Tensor | None) -> Directions:
    """Reads ``key`` [B, Hkv, N, D] once for its redundancy and for `similarity`.

    Args:
        valid: bool, broadcasts to [B, Hkv, N]; keys that are not valid do not count. None: all are valid.
    """
    valid = torch.ones(1, 1, 1, dtype=torch.bool, device=key.device) if valid is None else valid
    real = valid.expand(key.shape[:3])
    inverse_norm, total = unit_sums(key, real.unsqueeze(2))
    count = real.sum(dim=-1).float()
    return Directions(inverse_norm, total.squeeze(2) / count.clamp(min=1).unsqueeze(-1), count)


def redundancy(found: Directions) -> torch.Tensor:
    """Mean cosine between different keys of a head, clamped to [0, 1] (MixKV, arXiv 2510.20707, equation 6), in O(N D).

    With unit keys u_i and their mean m it equals ``(N |m|^2 - 1) / (N - 1)``.

    Returns: [B, Hkv] float32; 0 where there is a single key.
    """
    numerator = found.count * found.mean.square().sum(dim=-1) - 1
    return (numerator / (found.count - 1).clamp(min=1)).clamp(0, 1)


def diversity(key: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`similarity` [B, Hkv, N] and `redundancy` [B, Hkv] of keys [B, Hkv, N, D]; ``valid`` as in `directions`."""
    found = directions(key, valid)
    return similarity(key, found), redundancy(found)


def similarity(key: torch.Tensor, found: Directions) -> torch.Tensor:
    """Cosine of each key with what the head's keys have in common: <u_i, mean u>, not re-normalised (KeyDiff, 2504.15364).

    Returns: [B, Hkv, N] float32.
    """
    mean = found.mean.unsqueeze(2)
    # As a row times a matrix: torch multiplies a matrix by a column several times slower.
    along = by_block(key, key.shape[3], lambda part: (mean @ part.float().transpose(-1, -2)).squeeze(2))
    return along * found.inverse_norm


def norm(rows: torch.Tensor) -> torch.Tensor:
    """Norms [B, Hkv, N] of rows [B, Hkv, N, D], float32."""
    return by_block(rows, rows.shape[3], lambda part: torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32))


def projected_norm(value: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Norm of each value after a linear map of its head's.

    Args:
        value: [B, Hkv, N, D].
        factor: [Hkv, outputs, D] float32.

    Returns: [B, Hkv, N] float32.
    """
    transposed = factor.transpose(-1, -2)
    return by_block(value, sum(factor.shape[1:]), lambda part: torch.linalg.vector_norm(part.float() @ transposed, dim=-1))


def by_block(rows: torch.Tensor, numbers: int, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``function`` of ``rows`` [B, Hkv, N, D] a block of tokens at a time: [B, Hkv, n, D] to [B, Hkv, n] float32."""
    blocks = token_blocks(rows, numbers)
    if len(blocks) == 1:
        return function(rows)
    found = torch.empty(rows.shape[:3], dtype=torch.float32, device=rows.device)
    for first, last in blocks:
        found[:, :, first:last] = function(rows[:, :, first:last])
    return found


def unit_sums(key: torch.Tensor, kinds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse norms of keys [B, Hkv, N, D], and the sum of the unit keys of each of K kinds, a block of tokens at a time.

    Args:
        kinds: bool, broadcasts to [B, Hkv, K, N].

    Returns: float32 [B, Hkv, N], [B, Hkv, K, D].
    """
    inverse_norms, total = [], None
    for first, last in token_blocks(key, key.shape[3]):
        part = key[:, :, first:last].float()
        inverse_norm = 1 / torch.linalg.vector_norm(part, dim=-1).clamp_(min=1e-12)
        block = (inverse_norm.unsqueeze(2) * kinds[..., first:last]) @ part
        total = block if total is None else total + block
        inverse_norms.append(inverse_norm)
    return torch.cat(inverse_norms, dim=-1), total


def _logits(query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, options: LogitOptions) -> Logits:
    """The logits of the window's queries for a block of tokens, -inf where a query does not see a token."""
    batch, query_heads, window, size = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    groups = query_heads // kv_heads
    folded = (query.float() * options.scaling).reshape(batch, kv_heads, groups * window, size)
    newest = torch.arange(length - window, length, device=key.device).unsqueeze(-1)

    def block(first: int, last: int) -> torch.Tensor:
        part = key[:, :, first:last].float().transpose(-1, -2)
        logits = (folded @ part).view(batch, kv_heads, groups, window, last - first)
        if options.softcap is not None:
            logits = logits.div_(options.softcap).tanh_().mul_(options.softcap)
        hidden = max(first, length - window)
        if hidden < last:
            future = torch.arange(hidden, last, device=key.device) > newest
            logits[..., hidden - first :].masked_fill_(future, -torch.inf)
        if valid is not None:
            logits.masked_fill_(~valid[:, :, None, None, first:last], -torch.inf)
        return logits

    return block


def _weights(
    query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, options: LogitOptions, count: int
) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
    """The softmax of the window's logits over all tokens, for blocks of the first ``count``: ``(first, last)``, [B, Hkv, G, W, n].

    nan for queries that see nothing.
    """
    batch, query_heads, window, size = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    groups = query_heads // kv_heads
    blocks = token_blocks(key, groups * window + size)
    logits, sinks = _logits(query, key, valid, options), options.sinks
    sink = None if sinks is None else sinks.float().view(1, kv_heads, groups, 1, 1).expand(batch, -1, -1, window, 1)
    if len(blocks) == 1:
        whole = logits(0, length)
        if sink is not None:
            whole = torch.cat([whole, sink], dim=-1)
        yield (0, count), whole.softmax(dim=-1)[..., :count]
        return
    # The largest logit so far, and the sum of exponentials relative to it. From the lowest finite number on there is no inf - inf.
    shape, lowest = (batch, kv_heads, groups, window, 1), torch.finfo(torch.float32).min
    highest = torch.full(shape, lowest, device=key.device) if sink is None else sink
    mass = torch.zeros(shape, device=key.device) if sink is None else torch.ones(shape, device=key.device)
    for first, last in blocks:
        part = logits(first, last)
        higher = part.amax(dim=-1, keepdim=True).maximum(highest)
        mass = mass * (highest - higher).exp_() + part.sub_(higher).exp_().sum(dim=-1, keepdim=True)
        highest = higher
        del part
    for first, last in blocks:
        last = min(last, count)
        if first < last:
            yield (first, last), logits(first, last).sub_(highest).exp_().div_(mass)
