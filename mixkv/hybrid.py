"""HybridKV-style heads (arXiv 2604.05887), a reconstruction: static ones are pruned, dynamic ones keep all rows in chunks.

Pure functions on tensors: how sparse a head is, how many rows it gets, which of them are always resident, which chunks a query
chooses. Shapes as in `mixkv.scores`; M = N - W candidates. The chunks of a head are cut from its candidates in order, `CHUNK`
rows each, the last one perhaps shorter.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch

from .budgets import apportion

if TYPE_CHECKING:
    from .config import MixKVConfig
    from .selection import Ranking

CHUNK = 32
# The prompt's first rows, which dynamic heads always hold: whatever a query looks for, much of its weight rests on them.
FIRST = 4
# A key matters to a query if it gets this share of what the query's most attended key gets.
_MATTERS = 0.01
# Queries whose attention is held at once.
_QUERIES = 8


class Split(NamedTuple):
    """How a layer's rows are divided among its heads; all [B, Hkv].

    Attributes:
        dynamic: bool, whether the head's chunks are chosen step by step.
        rows: int64, resident rows beside the window. A dynamic head's are those of its slots, its first rows, and the ones just
            before the window.
        slots: int64, chunks attended in a step; 0 for static heads.
    """

    dynamic: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor

    @property
    def first(self) -> torch.Tensor:
        """Rows at the prompt's beginning [B, Hkv] that are always resident, of dynamic heads."""
        return FIRST * self.dynamic.long()

    @property
    def fixed(self) -> torch.Tensor:
        """Candidate rows [B, Hkv] that are always resident."""
        return self.rows - CHUNK * self.slots


class Plan(NamedTuple):
    """What becomes of a layer's heads: `plan`.

    Attributes:
        ranking: one whose `take` of ``rows`` keeps the rows that are always resident.
        rows: int64 [B, Hkv].
        sparsity: float32 [B, Hkv].
        dynamic, slots: as in `Split`.
        columns, chunked: int64 [B, Hkv], the first column that lies in chunks, and how many do.
    """

    ranking: Ranking
    rows: torch.Tensor
    sparsity: torch.Tensor
    dynamic: torch.Tensor
    slots: torch.Tensor
    columns: torch.Tensor
    chunked: torch.Tensor


def plan(
    query: torch.Tensor,
    key: torch.Tensor,
    config: MixKVConfig,
    ranking: Ranking,
    *,
    valid: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Plan:
    """Classifies the heads of a layer, and divides its rows among them.

    Args:
        query: [B, Hq, >= min(window, N), D], the prompt's last queries.
        key: [B, Hkv, N, D].
        ranking: of the same prompt, `mixkv.selection.rank`.
        valid, image: bool [B, N], real tokens and image tokens; None: all are real, there is no image.
        scaling, softcap, sinks: as in the model.
    """
    window = min(config.window, key.shape[2])
    query = query[:, :, query.shape[2] - window :]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = judges(query.shape[0], window, image, valid, key.device)
    sparse = sparsity(query, key, rows, valid, scaling=scaling, softcap=softcap, sinks=sinks)
    split = divide(sparse, ranking.base, ranking.choosable, threshold=config.hybrid_threshold, floor=config.hybrid_floor)
    ranks, padding = ranking.ranks, key.shape[2] - ranking.real
    if image is not None:
        ranks = text_first(ranks, image[:, : ranks.shape[-1]])
    ranks = torch.where(split.dynamic.unsqueeze(-1), fixed_ranks(split, ranking.choosable, padding, ranks.shape[-1]), ranks)
    return Plan(
        ranking=dataclasses.replace(ranking, ranks=ranks.to(torch.int32)),
        rows=split.fixed,
        sparsity=sparse,
        dynamic=split.dynamic,
        slots=split.slots,
        columns=padding + split.first,
        chunked=torch.where(split.dynamic, ranking.choosable - split.fixed, 0),
    )


def judges(
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
    rows: torch.Tensor,
    valid: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The share of visible keys that a head hardly attends to: with less than a hundredth of the largest weight.

    Weights are softmax attention, averaged over the G query heads of a KV head; the share is averaged over the queries.

    Args:
        query: [B, Hq, W, D], the last ones.
        key: [B, Hkv, N, D].
        rows: bool [B, W], the queries that count, at least one a batch row.
        valid: bool [B, N], False for padding on the left.
        scaling, softcap, sinks: as in the model.

    Returns: float32 [B, Hkv], from 0 to 1.
    """
    batch, query_heads, window, size = query.shape
    heads, length = key.shape[1], key.shape[2]
    keys = key.float().transpose(-1, -2)
    places = torch.arange(length, device=key.device)
    shares = []
    for first in range(0, window, _QUERIES):
        part = query[:, :, first : first + _QUERIES].float() * scaling
        count = part.shape[2]
        logits = (part.reshape(batch, heads, -1, size) @ keys).view(batch, heads, -1, count, length)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        seen = places <= (length - window + first + torch.arange(count, device=key.device)).unsqueeze(-1)
        seen = seen.expand(batch, -1, -1) if valid is None else seen & valid.unsqueeze(1)
        logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
        if sinks is not None:
            column = sinks.float().view(1, heads, -1, 1, 1).expand(batch, -1, -1, count, 1)
            logits = torch.cat([logits, column], dim=-1)
        weights = logits.softmax(dim=-1)[..., :length].mean(dim=2)
        small = (weights < _MATTERS * weights.amax(dim=-1, keepdim=True)) & seen.unsqueeze(1)
        shares.append(small.sum(dim=-1) / seen.sum(dim=-1).clamp(min=1).unsqueeze(1))
    counted = rows.unsqueeze(1).float()
    return (torch.cat(shares, dim=-1) * counted).sum(dim=-1) / counted.sum(dim=-1)


def divide(sparse: torch.Tensor, base: torch.Tensor, choosable: torch.Tensor, *, threshold: float, floor: float) -> Split:
    """Divides a layer's ``Hkv * base`` rows, exactly.

    Every dynamic head gets ``base`` rows, rounded down to its first rows and whole chunks. What is left belongs to the static
    heads: a share ``floor`` in equal parts, the rest in proportion to the share of keys that matter to them. Where no static
    head can take it, the rows just before a dynamic head's window stay resident. Heads that can be kept whole, or whose budget
    has no room for a chunk, are static.

    Args:
        sparse: [B, Hkv], of `sparsity`.
        base: [B] int, candidate rows per head on average.
        choosable: [B, Hkv] int, candidates.
        threshold: heads at least so sparse are static.
        floor: see above.
    """
    mean = base.unsqueeze(-1)
    total = (base * sparse.shape[-1]).minimum(choosable.sum(dim=-1))
    dynamic = (sparse < threshold) & (mean >= FIRST + CHUNK) & (mean < choosable)
    whole = dynamic * (mean - (mean - FIRST) % CHUNK)
    rest = total - whole.sum(dim=-1)
    room = torch.where(dynamic, 0, choosable)
    pruned = rest.minimum(room.sum(dim=-1))
    weight = (1 - sparse.double() + 1e-6) * ~dynamic
    equal = (~dynamic).double()
    weight, equal = (part / part.sum(dim=-1, keepdim=True).clamp(min=1e-30) for part in (weight, equal))
    shares = pruned.unsqueeze(-1) * (floor * equal + (1 - floor) * weight)
    rows = whole + apportion(shares, pruned, room)
    over = rest - pruned
    equal = dynamic.double() / dynamic.sum(dim=-1, keepdim=True).clamp(min=1)
    rows = rows + apportion(over.unsqueeze(-1) * equal, over, torch.where(dynamic, choosable - whole, 0))
    return Split(dynamic, rows, torch.where(dynamic, (rows - FIRST) // CHUNK, 0))


def text_first(ranks: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Ranks [B, Hkv, M] in which every text token comes before every image token, else in the order of ``ranks``.

    ``image`` [B, M]; padding, with ranks of M, stays last.
    """
    length = ranks.shape[-1]
    order = torch.where(ranks < length, ranks + length * image.unsqueeze(1), 3 * length)
    places = order.argsort(dim=-1, stable=True).argsort(dim=-1)
    return torch.where(ranks < length, places, length).to(ranks.dtype)


def fixed_ranks(split: Split, choosable: torch.Tensor, padding: torch.Tensor, length: int) -> torch.Tensor:
    """Ranks [B, Hkv, M] in which what a dynamic head always holds comes first: its first rows, and those before the window.

    ``padding`` [B, Hkv]: columns on the left that are none; ``length``: M.
    """
    place = torch.arange(length, device=padding.device) - padding.unsqueeze(-1)
    first, before_window = split.first.unsqueeze(-1), (choosable - split.fixed + split.first).unsqueeze(-1)
    ranks = torch.where(place < first, place, length)
    ranks = torch.where(place >= before_window, first + place - before_window, ranks)
    return ranks.masked_fill(place < 0, length)


def bounds(key: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The element-wise bounds of chunks of keys: the largest, then the smallest elements.

    Args:
        key: [rows, D].
        starts, rows: int [chunks], where each begins and how many rows it has, 1 to `CHUNK`.

    Returns: [chunks, 2 D], in key's dtype.
    """
    offset = torch.arange(CHUNK, device=key.device).minimum(rows.unsqueeze(-1) - 1)
    chunks = key[starts.unsqueeze(-1) + offset]
    return torch.cat([chunks.amax(dim=1), chunks.amin(dim=1)], dim=-1)


def choose(scores: torch.Tensor, slots: torch.Tensor, most: int) -> torch.Tensor:
    """The chunks with the highest scores.

    Args:
        scores: [S, C], -inf where there is no chunk.
        slots: int [S], how many each sequence chooses; no more than it has.
        most: the largest of them (host).

    Returns: int64 [S, most], -1 beyond a sequence's slots.
    """
    best = scores.topk(most, dim=-1).indices
    return best.masked_fill(torch.arange(most, device=scores.device) >= slots.unsqueeze(-1), -1)
