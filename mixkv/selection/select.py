"""Selection: scores and budgets become the positions each KV head keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .. import registry
from ..byte_budget import AUTO
from ..config import MixKVConfig, checked_config
from ..ops import dispatch
from ..ops.arguments import LogitOptions
from ..tensor_parallel import HeadShard
from .budget import base_entries, entries_above
from .context import AllocationContext, Measured, ScoreContext
from .ranking import KEPT, Ranking, Selection


def select(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: MixKVConfig,
    *,
    layer_idx: int = 0,
    num_layers: int = 1,
    lengths: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    redundancy: torch.Tensor | None = None,
    output_factor: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    measured: Measured | None = None,
) -> Selection:
    """Chooses the positions that each KV head keeps of a prompt: MixKV (arXiv 2510.20707) and what it builds on.

    Args:
        query: [B, Hq, >= min(window, N), D], the last queries of the prompt, rotated as the model uses them.
        key, value: [B, Hkv, N, D], the prompt's keys and values; Hq a multiple of Hkv.
        config: method, score, budget and the rest. A method that allocates over all layers (``global``) allocates this layer's
            own budget to its heads. Of ``hybridkv`` the result is what is always resident: see `mixkv.selection.hybrid.plan`.
        layer_idx, num_layers: which of the compressed layers this is (pyramidkv, sparsemm).
        lengths: [B, Hkv] int, forces the number of entries kept per head, window included.
        image: bool [B, N], image tokens (hybridkv); None: there are none.
        attention_mask: [B, N] or [B, Hkv, N], nonzero for real tokens; padding on the left only.
        redundancy: [Hkv] or [B, Hkv], in place of the measured one; by default ``config.redundancy`` decides.
        output_factor: [Hkv, D, D], `mixkv.hf.output_projection.output_factor`, for the scores and the methods that weigh an
            entry by what it adds to the layer's output; None: by its value's norm.
        scaling: factor on the attention logits; D ** -0.5 by default.
        softcap, sinks: the model's logit soft-cap, and sink logits [Hq].
        measured: what else was measured on the prompt, for a score that needs it.

    Returns: a `Selection`. Padding is never kept; a row of N real tokens within its budget is kept whole.

    Raises:
        ValueError: shapes that do not fit together, padding on the right, forced lengths out of range.
    """
    logits = LogitOptions.of(key.shape[-1], scaling, softcap, sinks)
    ranking = rank(
        query,
        key,
        value,
        config,
        layer_idx=layer_idx,
        num_layers=num_layers,
        attention_mask=attention_mask,
        redundancy=redundancy,
        output_factor=output_factor,
        logits=logits,
        measured=measured,
    )
    if lengths is not None:
        return ranking.take(_forced(lengths.to(key.device), ranking.real, ranking.width))
    method = registry.method(config.method)
    if method.plan is None:
        return ranking.take(allocate(config, ranking, layer_idx, num_layers))
    valid = None if attention_mask is None else _valid(attention_mask, key).any(dim=1)
    plan = method.plan(query, key, config, ranking, valid=valid, image=image, logits=logits)
    return plan.ranking.take(plan.entries)


def rank(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: MixKVConfig,
    *,
    layer_idx: int = 0,
    num_layers: int = 1,
    attention_mask: torch.Tensor | None = None,
    redundancy: torch.Tensor | None = None,
    output_factor: torch.Tensor | Callable[[], torch.Tensor | None] | None = None,
    logits: LogitOptions | None = None,
    shard: HeadShard | None = None,
    longest: torch.Tensor | None = None,
    newest: torch.Tensor | None = None,
    revise: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    measured: Measured | None = None,
) -> Ranking:
    """Puts the candidates of each head in order, by ``config.score``.

    Args:
        query, key, value, config, layer_idx, num_layers, attention_mask, redundancy: as in `select`.
        output_factor: as in `select`, or a function that returns it, called if it is needed.
        logits: how the model computes its logits; None: with factor D ** -0.5 and nothing else.
        shard: which heads of the layer these are, where other processes have others; None: all.
        longest: int64 [B], real tokens of the layer's longest head, where that may be another process's.
        newest: int64 [B], only so many of each head's last real tokens are candidates and window, the others are always kept;
            None: all.
        revise: is given the scores and the importance [B, Hkv, M], -inf for padding, and returns those to be used.
        measured: what else was measured on the prompt.

    Raises:
        ValueError: shapes that do not fit together, padding on the right, or a registered score that returned no numbers.
    """
    config = checked_config(config)
    _check_shapes(query, key, value, config.window)
    batch, heads, length, _ = key.shape
    mask = None if attention_mask is None else _valid(attention_mask, key)
    window = min(config.window, length)
    unequal = mask is not None or longest is not None
    score = registry.score(config.score)
    context = ScoreContext(
        query[:, :, query.shape[2] - window :],
        key,
        value,
        config,
        mask,
        layer_idx=layer_idx,
        num_layers=num_layers,
        uses_output_importance=score.uses_output_importance,
        output_factor=output_factor,
        given_redundancy=redundancy,
        shard=shard,
        logits=logits,
        measured=measured or Measured(),
    )
    scores = context.without_padding(_compute(score, context), -torch.inf)
    if score.comparable:
        importance = scores
    else:
        competes = registry.method(config.method).uses_output_importance
        importance = context.without_padding(context.output_importance if competes else context.importance, -torch.inf)
    valid, measured = context.valid if unequal else None, context.redundancy
    # What the context has computed is not needed while candidates are sorted.
    del context
    every = heads if shard is None else shard.total
    entries = partial(base_entries, config, key=key, value=value, heads=every, num_layers=num_layers)
    if not unequal:
        real, choosable = (torch.full((batch, heads), count, device=key.device) for count in (length, length - window))
        base, padding = entries(real[:, 0]), [0] * batch
    else:
        real = valid.expand(batch, heads, length).sum(dim=-1)
        choosable = (real - window).clamp(min=0)
        longest = real.amax(dim=-1) if longest is None else longest
        base, padding = entries(longest), (length - longest).tolist()
    if revise is not None:
        scores, importance = revise(scores, importance)
    if newest is None:
        ranks = _ranks(scores, padding)
    else:
        earlier = torch.arange(length - window, device=key.device) < (length - newest).view(-1, 1, 1)
        scores, importance = (numbers.masked_fill(earlier, -torch.inf) for numbers in (scores, importance))
        ranks = _ranks(scores, padding).masked_fill(earlier & (valid[..., : length - window] if unequal else True), KEPT)
        choosable, base = choosable.minimum((newest - window).clamp(min=0).unsqueeze(-1)), entries(newest)
    return Ranking(
        ranks=ranks,
        importance=importance,
        base=base,
        real=real,
        choosable=choosable,
        window=None if mask is None else mask[..., length - window :],
        width=window,
        redundancy=measured,
        scores=scores,
    )


def allocate(config: MixKVConfig, ranking: Ranking, layer_idx: int, num_layers: int) -> torch.Tensor:
    """Candidates [B, Hkv] (int64) that each head of a layer keeps, by the configured method within the layer, or by the
    threshold.

    Raises:
        ValueError: a registered method returned something else.
    """
    if config.budget == AUTO:
        # Importance is the score, see `rank`, also that of heads in other processes.
        return entries_above(ranking.importance, config.threshold)
    method = registry.method(config.method)
    budget, candidates = ranking.base.cpu(), ranking.choosable.cpu()
    entries = method.allocate(AllocationContext(budget, candidates, ranking.importance, layer_idx, num_layers, config))
    entries = entries if method.built_in else _checked_entries(method.name, entries, candidates)
    return entries.to(ranking.choosable.device)


def _compute(score: registry.Score, context: ScoreContext) -> torch.Tensor:
    """Scores [B, Hkv, M], float32; the user's are checked."""
    scores = score.compute(context)
    if score.built_in:
        return scores
    shape = [*context.key.shape[:2], context.num_candidates]
    if not isinstance(scores, torch.Tensor) or list(scores.shape) != shape:
        found = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"score {score.name!r} returned {found} for {shape} candidates: return a tensor of that shape")
    scores = scores.float()
    if scores.masked_fill(~context.valid_candidates, 0.0).isnan().any():
        raise ValueError(f"score {score.name!r} returned nan: divide by something that cannot be zero")
    return scores


def _checked_entries(name: str, entries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """What a user's method returned, int64 [B, Hkv]."""
    fits = isinstance(entries, torch.Tensor) and entries.shape == candidates.shape
    if not fits or entries.is_floating_point() or entries.is_complex() or entries.dtype == torch.bool:
        found = f"{entries.dtype} {list(entries.shape)}" if isinstance(entries, torch.Tensor) else type(entries).__name__
        raise ValueError(
            f"method {name!r} returned {found} and must return an integer tensor {list(candidates.shape)}: context.apportion(weights) "
            f"makes one"
        )
    entries = entries.to(candidates.device, torch.int64)
    if ((entries < 0) | (entries > candidates)).any():
        raise ValueError(
            f"method {name!r} returned {entries.tolist()} entries for {candidates.tolist()} candidates: keep from 0 to that many"
        )
    return entries


def _ranks(score: torch.Tensor, padding: list[int]) -> torch.Tensor:
    """Int32 [B, Hkv, M]: places by ``score`` within each head; ``padding`` [B] tokens on the left come last.

    Max pooling makes exact ties. They go to whichever `torch.sort` puts first, as in the authors' implementation; its
    order depends on the row's length, so padding is cut off for a padded row to keep what it would keep alone.
    """
    if not any(padding):
        return dispatch.places(score)
    ranks = torch.full(score.shape, score.shape[-1], dtype=torch.int32, device=score.device)
    for row, cut in enumerate(padding):
        ranks[row, :, cut:] = dispatch.places(score[row : row + 1, :, cut:])[0]
    return ranks


def _forced(lengths: torch.Tensor, real: torch.Tensor, window: int) -> torch.Tensor:
    fixed = real.clamp(max=window)
    if lengths.shape != real.shape or (lengths < fixed).any() or (lengths > real).any():
        raise ValueError(
            f"lengths {lengths.tolist()} must have shape {list(real.shape)} and lie between the window's real tokens "
            f"{fixed.tolist()} and all real tokens {real.tolist()}"
        )
    return lengths - fixed


def _valid(attention_mask: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Bool [B, 1, N] or [B, Hkv, N]."""
    batch, heads, length, _ = key.shape
    valid = attention_mask.to(key.device).bool()
    valid = valid.unsqueeze(1) if valid.ndim == 2 else valid
    if valid.ndim != 3 or valid.shape[0] != batch or valid.shape[1] not in (1, heads) or valid.shape[2] != length:
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; it must be [{batch}, {length}]")
    if (valid[..., :-1] & ~valid[..., 1:]).any():
        raise ValueError("padding must be on the left: set tokenizer.padding_side = 'left'")
    return valid


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> None:
    if key.ndim != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"key {list(key.shape)} and value {list(value.shape)} must be [B, Hkv, N, D] with equal B, Hkv, N")
    if query.ndim != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {list(query.shape)} does not fit key {list(key.shape)}: [B, Hq, W, D] with Hq a multiple of Hkv is needed"
        )
    if key.shape[2] == 0 or query.shape[2] < min(window, key.shape[2]):
        raise ValueError(
            f"{query.shape[2]} queries for {key.shape[2]} keys: the last min(window={window}, N) queries of a prompt of at "
            f"least one token are needed"
        )
