"""HybridKV-style heads (arXiv 2604.05887), a reconstruction: static ones are pruned, dynamic ones keep all rows in chunks.

Pure functions on tensors: how sparse a head is, how many rows it gets, which of them are always resident. Shapes as in
`mixkv.scores`; M = N - W candidates. A dynamic head's chunks are cut from all of the prompt between its first rows and its
last, in order; the last chunk may be shorter.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..ops import score_reference
from .apportion import apportion, to_device, to_host

if TYPE_CHECKING:
    from ..config import MixKVConfig
    from .ranking import Ranking

# The prompt's first rows, which dynamic heads always hold: whatever a query looks for, much of its weight rests on them.
FIRST = 4
# The prompt's last rows, which they always hold, of a window that is not shorter. The others can be chosen like any.
LAST = 8


class Split(NamedTuple):
    """How a layer's rows are divided among its heads; all [B, Hkv].

    Attributes:
        dynamic: bool, whether the head's chunks are chosen step by step.
        rows: int64, resident rows beside the last `LAST`. A dynamic head's are those of its slots, its first rows, and the ones
            just before the last.
        slots: int64, chunks attended in a step, before `mixkv.cache.global_budget.ChunkBudget` shares them out over the model; 0 for static
            heads.
        chunk: rows of a chunk.
    """

    dynamic: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor
    chunk: int

    @property
    def first(self) -> torch.Tensor:
        """Rows at the prompt's beginning [B, Hkv] that are always resident, of dynamic heads."""
        return FIRST * self.dynamic.long()

    @property
    def fixed(self) -> torch.Tensor:
        """Rows [B, Hkv] beside the last that are always resident."""
        return self.rows - self.chunk * self.slots


class Plan(NamedTuple):
    """What becomes of a layer's heads: `plan`.

    Attributes:
        ranking: one whose `take` of ``rows`` keeps the rows that are always resident.
        rows: int64 [B, Hkv].
        sparsity: float32 [B, Hkv].
        dynamic, slots: as in `Split`.
        columns, chunked: int64 [B, Hkv], the first column that lies in chunks, and how many do.
        chunk: rows of a chunk.
    """

    ranking: Ranking
    rows: torch.Tensor
    sparsity: torch.Tensor
    dynamic: torch.Tensor
    slots: torch.Tensor
    columns: torch.Tensor
    chunked: torch.Tensor
    chunk: int


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
        ranking: of the same prompt, `mixkv.selection.select.rank`.
        valid, image: bool [B, N], real tokens and image tokens; None: all are real, there is no image.
        scaling, softcap, sinks: as in the model.
    """
    window = min(config.window, key.shape[2])
    query = query[:, :, query.shape[2] - window :]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = judges(query.shape[0], window, image, valid, key.device)
    sparse = sparsity(query, key, rows, valid, scaling=scaling, softcap=softcap, sinks=sinks)
    ranks, padding = ranking.ranks, key.shape[2] - ranking.real
    if image is not None:
        ranks = text_first(ranks, image[:, : ranks.shape[-1]])
    ranking, candidates = narrowed(dataclasses.replace(ranking, ranks=ranks)), ranking.choosable
    split = divide(
        sparse,
        ranking.base,
        ranking.choosable,
        window=ranking.choosable - candidates,
        chunk=config.hybrid_chunk,
        threshold=config.hybrid_threshold,
        floor=config.hybrid_floor,
    )
    fixed = fixed_ranks(split, ranking.choosable, padding, ranking.ranks.shape[-1])
    ranks = torch.where(split.dynamic.unsqueeze(-1), fixed, ranking.ranks)
    return Plan(
        ranking=dataclasses.replace(ranking, ranks=ranks.to(torch.int32)),
        rows=split.fixed,
        sparsity=sparse,
        dynamic=split.dynamic,
        slots=split.slots,
        columns=padding + split.first,
        chunked=torch.where(split.dynamic, ranking.choosable - split.fixed, 0),
        chunk=config.hybrid_chunk,
    )


def narrowed(ranking: Ranking) -> Ranking:
    """The same candidates behind the window's own rows, so that only the `LAST` of these are kept whatever is asked for.

    ``base`` stays what a head keeps on average beside its whole window.
    """
    batch, heads, length = ranking.ranks.shape
    window = ranking.window[..., : max(ranking.window.shape[-1] - LAST, 0)].expand(batch, heads, -1)
    count, whole = window.sum(dim=-1, keepdim=True), length + window.shape[-1]
    before = torch.where(ranking.ranks < length, ranking.ranks + count, whole)
    within = torch.where(window, window.cumsum(dim=-1) - 1, whole)
    return dataclasses.replace(
        ranking,
        ranks=torch.cat([before, within], dim=-1),
        choosable=ranking.choosable + count.squeeze(-1),
        window=ranking.window[..., window.shape[-1] :],
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
    """The share of a head's attention that rests on few tokens which stay whatever is pruned: the first rows, and the window's.

    Of the query heads that share a KV head the one counts that attends to the others most.

    Args:
        query: [B, Hq, W, D], the last ones.
        key: [B, Hkv, N, D].
        rows: bool [B, W], the queries that count, at least one a batch row.
        valid: bool [B, N], False for padding on the left.
        scaling, softcap, sinks: as in the model; what goes to a sink rests there.

    Returns: float32 [B, Hkv], from 0 to 1.
    """
    length, window = key.shape[2], query.shape[2]
    places = torch.arange(length, device=key.device)
    real = torch.ones(1, length, dtype=torch.bool, device=key.device) if valid is None else valid
    others = (real.cumsum(dim=-1) > FIRST) & (places < length - window)
    logits = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    valid = None if valid is None else valid.unsqueeze(1)
    found = score_reference.attention_share(query, key, valid, others.unsqueeze(1), **logits).amax(dim=2)
    counted = rows.unsqueeze(1)
    return 1 - found.masked_fill(~counted, 0.0).sum(dim=-1) / counted.sum(dim=-1)


def divide(
    sparse: torch.Tensor,
    base: torch.Tensor,
    choosable: torch.Tensor,
    *,
    window: torch.Tensor,
    chunk: int,
    threshold: float,
    floor: float,
) -> Split:
    """Divides a layer's ``Hkv * (base + window)`` rows, exactly.

    Every dynamic head gets an equal share of them, rounded down to its first rows and whole chunks. What is left belongs to the
    static heads: to each its window, then a share ``floor`` of the rest in equal parts, and what remains in proportion to the
    attention that they give to what is not kept for certain. Where no static head can take it, the rows just before a dynamic head's last stay
    resident. Heads that can be kept whole, or whose budget has no room for a chunk, are static. How many chunks a dynamic head
    attends to in the end, `mixkv.cache.global_budget.ChunkBudget` decides.

    Args:
        sparse: [B, Hkv], of `sparsity`.
        base: [B] int, rows per head on average, beside the window.
        choosable: [B, Hkv] int, rows of the prompt but for its last, those of the window included.
        window: [B, Hkv] int, how many of them are the window's.
        chunk: rows of a chunk.
        threshold: heads at least so sparse are static; 1: none is.
        floor: see above.
    """
    device = sparse.device
    sparse, (base, choosable, window) = sparse.cpu().numpy(), to_host(base, choosable, window)
    candidates, mean = choosable - window, base[:, None]
    share = mean + window
    total = np.minimum(base * sparse.shape[-1], candidates.sum(axis=-1))
    dynamic = ((sparse < threshold) | (threshold == 1)) & (share >= FIRST + chunk) & (mean < candidates)
    whole = dynamic * (share - (share - FIRST) % chunk)
    rest = total - (whole - dynamic * window).sum(axis=-1)
    room = np.where(dynamic, 0, candidates)
    pruned = np.minimum(rest, room.sum(axis=-1))
    weight = (1 - sparse.astype(np.float64) + 1e-6) * ~dynamic
    weight, equal = (
        part / part.sum(axis=-1, keepdims=True).clip(min=1e-30) for part in (weight, (~dynamic).astype(np.float64))
    )
    shares = pruned[:, None] * (floor * equal + (1 - floor) * weight)
    static = ~dynamic * window + apportion(shares, pruned, room)
    over = rest - pruned
    equal = dynamic / dynamic.sum(axis=-1, keepdims=True).clip(min=1)
    rows = whole + static + apportion(over[:, None] * equal, over, np.where(dynamic, choosable - whole, 0))
    slots = np.where(dynamic, (rows - FIRST) // chunk, 0)
    return Split(*(to_device(part, device) for part in (dynamic, rows, slots)), chunk)


def text_first(ranks: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Ranks [B, Hkv, M] in which every text token comes before every image token, else in the order of ``ranks``.

    ``image`` [B, M]; padding, with ranks of M, stays last.
    """
    length = ranks.shape[-1]
    order = torch.where(ranks < length, ranks + length * image.unsqueeze(1), 3 * length)
    places = order.argsort(dim=-1, stable=True).argsort(dim=-1)
    return torch.where(ranks < length, places, length).to(ranks.dtype)


def fixed_ranks(split: Split, choosable: torch.Tensor, padding: torch.Tensor, length: int) -> torch.Tensor:
    """Ranks [B, Hkv, M] in which what a dynamic head always holds comes first: its first rows, and those before the last.

    ``padding`` [B, Hkv]: columns on the left that are none; ``length``: M, all columns but the last.
    """
    place = torch.arange(length, device=padding.device) - padding.unsqueeze(-1)
    first, before_last = split.first.unsqueeze(-1), (choosable - split.fixed + split.first).unsqueeze(-1)
    ranks = torch.where(place < first, place, length)
    ranks = torch.where(place >= before_last, first + place - before_last, ranks)
    return ranks.masked_fill(place < 0, length)
