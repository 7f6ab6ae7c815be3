"""HybridKV-style heads (arXiv 2604.05887), a reconstruction: static ones are pruned, dynamic ones keep all entries in chunks.

Pure functions on tensors: how many entries a head gets, and which of them are always resident. Shapes as in
`mixkv.selection.context`. A dynamic head's chunks are cut from all of the prompt between its first tokens and its last, in
order; the last chunk may be shorter. ``hybrid_first`` of the prompt's first tokens are always resident, because much attention
rests on them whatever the query, and so are ``hybrid_last`` of its last, if the window is not shorter; the window's others can
be chosen like any token.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

from ..config import MixKVConfig
from ..ops.arguments import LogitOptions
from .apportion import apportion, to_device, to_host
from .ranking import Ranking
from .sparsity import scoring_queries, sparsity


class Split(NamedTuple):
    """How a layer's entries are allocated to its heads; all [B, Hkv].

    Attributes:
        dynamic: bool, whether the head's chunks are chosen step by step.
        entries: int64, resident entries beside the last ones. A dynamic head's are those of its slots, its first tokens, and
            the ones just before the last.
        slots: int64, chunks attended to in a step, before `mixkv.selection.global_budget` shares them out over the model; 0 for
            static heads.
        first: int64, the prompt's first tokens that are always resident; 0 for static heads.
        chunk: tokens of a chunk.
    """

    dynamic: torch.Tensor
    entries: torch.Tensor
    slots: torch.Tensor
    first: torch.Tensor
    chunk: int

    @property
    def fixed(self) -> torch.Tensor:
        """Entries [B, Hkv] beside the last that are always resident."""
        return self.entries - self.chunk * self.slots


class Plan(NamedTuple):
    """Which heads of a layer are pruned and which are not: `plan`.

    Attributes:
        ranking: one whose `take` of ``entries`` keeps the entries that are always resident.
        entries: int64 [B, Hkv].
        sparsity: float32 [B, Hkv].
        dynamic, slots: as in `Split`.
        first_chunked, chunked: int64 [B, Hkv], position of the first token that lies in chunks, and how many tokens do.
        chunk: tokens of a chunk.
    """

    ranking: Ranking
    entries: torch.Tensor
    sparsity: torch.Tensor
    dynamic: torch.Tensor
    slots: torch.Tensor
    first_chunked: torch.Tensor
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
    logits: LogitOptions | None = None,
) -> Plan:
    """Classifies the heads of a layer, and allocates its entries to them.

    Args:
        query: [B, Hq, >= min(window, N), D], the prompt's last queries.
        key: [B, Hkv, N, D].
        ranking: of the same prompt, `mixkv.selection.select.rank`.
        valid, image: bool [B, N], real tokens and image tokens; None: all are real, there is no image.
        logits: how the model computes its logits; None: with factor D ** -0.5 and nothing else.
    """
    window = min(config.window, key.shape[2])
    query = query[:, :, query.shape[2] - window :]
    scoring = scoring_queries(query.shape[0], window, image, valid, key.device)
    logits = logits or LogitOptions.of(query.shape[-1])
    sparse = sparsity(query, key, scoring, valid, logits, first=config.hybrid_first)
    ranks, padding = ranking.ranks, key.shape[2] - ranking.real
    if image is not None:
        ranks = text_first(ranks, image[:, : ranks.shape[-1]])
    ranking, candidates = narrowed(dataclasses.replace(ranking, ranks=ranks), config.hybrid_last), ranking.choosable
    split = allocate_entries(
        sparse,
        ranking.base,
        ranking.choosable,
        window=ranking.choosable - candidates,
        chunk=config.hybrid_chunk,
        threshold=config.hybrid_threshold,
        floor=config.hybrid_floor,
        first=config.hybrid_first,
    )
    fixed = fixed_ranks(split, ranking.choosable, padding, ranking.ranks.shape[-1])
    ranks = torch.where(split.dynamic.unsqueeze(-1), fixed, ranking.ranks)
    return Plan(
        ranking=dataclasses.replace(ranking, ranks=ranks.to(torch.int32)),
        entries=split.fixed,
        sparsity=sparse,
        dynamic=split.dynamic,
        slots=split.slots,
        first_chunked=padding + split.first,
        chunked=torch.where(split.dynamic, ranking.choosable - split.fixed, 0),
        chunk=config.hybrid_chunk,
    )


def narrowed(ranking: Ranking, last: int) -> Ranking:
    """The window's own tokens but for the ``last`` become candidates, ranked before all others.

    So only the ``last`` tokens are kept whatever is asked for. ``base`` remains what a head keeps on average beside its whole
    window.
    """
    batch, heads, length = ranking.ranks.shape
    width = max(ranking.width - last, 0)
    real = torch.ones(1, 1, 1, dtype=torch.bool, device=ranking.ranks.device) if ranking.window is None else ranking.window
    window = real.expand(batch, heads, ranking.width)[..., :width]
    count, whole = window.sum(dim=-1, keepdim=True), length + width
    before = torch.where(ranking.ranks < length, ranking.ranks + count, whole)
    within = torch.where(window, window.cumsum(dim=-1) - 1, whole)
    return dataclasses.replace(
        ranking,
        ranks=torch.cat([before, within], dim=-1),
        choosable=ranking.choosable + count.squeeze(-1),
        window=None if ranking.window is None else ranking.window[..., width:],
        width=ranking.width - width,
    )


def allocate_entries(
    sparse: torch.Tensor,
    base: torch.Tensor,
    choosable: torch.Tensor,
    *,
    window: torch.Tensor,
    chunk: int,
    threshold: float,
    floor: float,
    first: int,
) -> Split:
    """Allocates a layer's ``Hkv * (base + window)`` entries to its heads, exactly.

    Every dynamic head gets an equal share of them, rounded down to its first tokens and whole chunks. What is left belongs to
    the static heads: to each its window, then a share ``floor`` of the rest in equal parts, and what remains in proportion to
    the attention that they give to tokens that are not always kept. Where no static head can take it, the tokens just before a
    dynamic head's last stay resident. Heads that can be kept whole, or whose budget has no room for a chunk, are static. How
    many chunks a dynamic head attends to in the end, `mixkv.selection.global_budget` decides.

    Args:
        sparse: [B, Hkv], of `sparsity`.
        base: [B] int, entries per head on average, beside the window.
        choosable: [B, Hkv] int, tokens of the prompt but for its last, those of the window included.
        window: [B, Hkv] int, how many of them are the window's.
        chunk: tokens of a chunk.
        threshold: heads at least so sparse are static; 1: none is.
        floor: see above.
        first: the prompt's first tokens that dynamic heads always keep resident.
    """
    device = sparse.device
    sparse, (base, choosable, window) = sparse.cpu().numpy(), to_host(base, choosable, window)
    candidates, mean = choosable - window, base[:, None]
    share = mean + window
    total = np.minimum(base * sparse.shape[-1], candidates.sum(axis=-1))
    dynamic = ((sparse < threshold) | (threshold == 1)) & (share >= first + chunk) & (mean < candidates)
    whole = dynamic * (share - (share - first) % chunk)
    rest = total - (whole - dynamic * window).sum(axis=-1)
    room = np.where(dynamic, 0, candidates)
    pruned = np.minimum(rest, room.sum(axis=-1))
    weight = (1 - sparse.astype(np.float64) + 1e-6) * ~dynamic
    weight, equal = (
        part / part.sum(axis=-1, keepdims=True).clip(min=1e-30) for part in (weight, (~dynamic).astype(np.float64))
    )
    shares = pruned[:, None] * (floor * equal + (1 - floor) * weight)
    static = ~dynamic * window + apportion(shares, pruned, room)
    left = rest - pruned
    equal = dynamic / dynamic.sum(axis=-1, keepdims=True).clip(min=1)
    entries = whole + static + apportion(left[:, None] * equal, left, np.where(dynamic, choosable - whole, 0))
    slots = np.where(dynamic, (entries - first) // chunk, 0)
    counts = (dynamic, entries, slots, first * dynamic.astype(np.int64))
    dynamic, entries, slots, firsts = (to_device(part, device) for part in counts)
    return Split(dynamic, entries, slots, firsts, chunk)


def text_first(ranks: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Ranks [B, Hkv, M] in which every text token comes before every image token, else in the order of ``ranks``.

    ``image`` [B, M]; padding, with ranks of M, stays last.
    """
    length = ranks.shape[-1]
    order = torch.where(ranks < length, ranks + length * image.unsqueeze(1), 3 * length)
    places = order.argsort(dim=-1, stable=True).argsort(dim=-1)
    return torch.where(ranks < length, places, length).to(ranks.dtype)


def fixed_ranks(split: Split, choosable: torch.Tensor, padding: torch.Tensor, length: int) -> torch.Tensor:
    """Ranks [B, Hkv, M] in which a dynamic head's resident tokens come first: its first ones, and those before the last.

    ``padding`` [B, Hkv]: padding tokens on the left; ``length``: M, all tokens but the last.
    """
    place = torch.arange(length, device=padding.device) - padding.unsqueeze(-1)
    first, before_last = split.first.unsqueeze(-1), (choosable - split.fixed + split.first).unsqueeze(-1)
    ranks = torch.where(place < first, place, length)
    ranks = torch.where(place >= before_last, first + place - before_last, ranks)
    return ranks.masked_fill(place < 0, length)
