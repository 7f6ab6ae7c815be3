"""Selection: scores and budgets become the positions each KV head keeps."""

from __future__ import annotations

import torch

from ..config import MixKVConfig
from ..ops import dispatch, score_reference
from ..registry import CONTESTS, OUTPUT_SCORES
from ..tensor_parallel import Slice
from . import budgets, hybrid, scores
from .ranking import Ranking, Selection


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
    **options,
) -> Selection:
    """Chooses the columns that each KV head keeps of a prompt: MixKV (arXiv 2510.20707) and what it builds on.

    Args:
        query: [B, Hq, >= min(window, N), D], the last queries of the prompt, rotated as the model uses them.
        key, value: [B, Hkv, N, D], the prompt's keys and values; Hq a multiple of Hkv.
        config: method, score, budget and the rest. ``global`` shares rows out among the heads of this layer alone,
            like ``adakv``; over layers: `mixkv.cache.global_budget`. Of ``hybridkv`` the result is what is always resident: see
            `mixkv.selection.hybrid.plan`.
        layer_idx, num_layers: which of the compressed layers this is (pyramidkv, sparsemm).
        lengths: [B, Hkv] int, forces the columns kept per head, window included.
        image: bool [B, N], image tokens (hybridkv); None: there are none.
        options: see `rank`.

    Returns: a `Selection`. Padding is never kept; a row of N real tokens within its budget is kept whole.

    Raises:
        ValueError: shapes that do not fit together, padding on the right, forced lengths out of range.
    """
    ranking = rank(query, key, value, config, layer_idx=layer_idx, num_layers=num_layers, **options)
    if lengths is None and config.method == "hybridkv":
        logits = {name: options.get(name) for name in ("scaling", "softcap", "sinks")}
        mask = options.get("attention_mask")
        valid = None if mask is None else _valid(mask, key).any(dim=1)
        found = hybrid.plan(query, key, config, ranking, valid=valid, image=image, **logits)
        return found.ranking.take(found.rows)
    if lengths is None:
        return ranking.take(quota(config, ranking, layer_idx, num_layers))
    return ranking.take(_forced(lengths.to(key.device), ranking.real, ranking.window.shape[-1]))


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
    output_factor: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    part: Slice | None = None,
    longest: torch.Tensor | None = None,
) -> Ranking:
    """Puts the candidates of each head in order, by ``config.score``.

    Args:
        query, key, value, config, layer_idx, num_layers: as in `select`.
        attention_mask: [B, N] or [B, Hkv, N], nonzero for real tokens; padding on the left only.
        redundancy: [Hkv] or [B, Hkv], in place of the measured one; by default ``config.redundancy`` decides.
        output_factor: [Hkv, D, D], `mixkv.hf.output_projection.output_factor`, for the scores and the method that weigh a row by what
            it adds to the layer's output; None: by its value's norm.
        scaling: factor on the attention logits; D ** -0.5 by default.
        softcap, sinks: the model's logit soft-cap, and sink logits [Hq].
        part: which heads of the layer these are, where other processes hold others; None: all.
        longest: int64 [B], real tokens of the layer's longest head, where that may be another process's.

    Raises:
        ValueError: shapes that do not fit together, padding on the right.
    """
    _check_shapes(query, key, value, config.window)
    batch, heads, length, size = key.shape
    valid = _valid(attention_mask, key)
    window = min(config.window, length)
    candidates = length - window
    real = valid.expand(batch, heads, length).sum(dim=-1)
    longest = real.amax(dim=-1) if longest is None else longest
    padding = valid[..., :candidates].logical_not()
    logits = {"scaling": size**-0.5 if scaling is None else scaling, "softcap": softcap, "sinks": sinks}

    def attention(statistic: str) -> torch.Tensor:
        return dispatch.window_attention(
            config.backend,
            query[:, :, query.shape[2] - window :],
            key,
            None if attention_mask is None else valid,
            statistic=statistic,
            group_reduce=config.group_reduce,
            **logits,
        )

    if config.score in OUTPUT_SCORES or config.method in CONTESTS:
        if output_factor is None:
            norm = score_reference.norm(value)
        else:
            norm = dispatch.projected_norm(config.backend, value, output_factor)
        output = scores.output_importance(attention("rms"), norm).masked_fill(padding, 0.0)
    if config.score in OUTPUT_SCORES:
        importance = output
    else:
        importance = scores.pool(attention("mean"), config.kernel_size, config.pooling).masked_fill(padding, 0.0)
    found = scores.directions(key, valid)
    if redundancy is None:
        redundancy = _configured_redundancy(config, layer_idx, num_layers, found, part or Slice(heads, heads))
    redundancy = redundancy.to(key.device, torch.float32).expand(batch, heads)
    score = scores.combine(config.score, importance, key, value, valid, found, redundancy)
    return Ranking(
        ranks=_ranks(score, (length - longest).tolist() if attention_mask is not None else [0] * batch),
        importance=(output if config.method in CONTESTS else importance).masked_fill(padding, -torch.inf),
        base=base_rows(config, longest),
        real=real,
        choosable=(real - window).clamp(min=0),
        window=valid[..., candidates:],
        redundancy=redundancy,
        scores=score,
    )


def quota(config: MixKVConfig, ranking: Ranking, layer_idx: int, num_layers: int) -> torch.Tensor:
    """Candidate rows [B, Hkv] that each head of a layer keeps, by the configured method; see `select`."""
    base, choosable = ranking.base, ranking.choosable
    if config.method == "snapkv":
        return budgets.uniform(base, choosable)
    if config.method in ("adakv", "global"):
        floor = config.ada_floor if config.method == "adakv" else config.global_floor
        return budgets.ada(base, choosable, ranking.importance, floor=floor)
    if config.method == "pyramidkv":
        return budgets.pyramid(base, choosable, layer_idx=layer_idx, num_layers=num_layers, beta=config.pyramid_beta)
    return budgets.from_profile(base, choosable, config.profile, layer_idx=layer_idx, num_layers=num_layers)


def base_rows(config: MixKVConfig, length: torch.Tensor) -> torch.Tensor:
    """Candidate rows per head on average, window left out, for prompts of ``length`` [B] real tokens."""
    return (rows_per_head(config.budget, length) - config.window).clamp(min=0)


def rows_per_head(budget: int | float, length: torch.Tensor) -> torch.Tensor:
    """The budget in rows for prompts of ``length`` [B] real tokens; a float is a share, rounded to the nearest row."""
    if isinstance(budget, float):
        return torch.tensor([round(tokens * budget) for tokens in length.tolist()], device=length.device)
    return torch.full_like(length, budget)


def _ranks(score: torch.Tensor, padding: list[int]) -> torch.Tensor:
    """Int32 [B, Hkv, M]: places by ``score`` within each head, ``padding`` [B] columns on the left apart, which come last.

    Max pooling makes exact ties. They go to whichever `torch.sort` puts first, as in the authors' implementation; its
    order depends on the row's length, so padding is cut off for a padded row to keep what it would keep alone.
    """
    ranks = torch.full(score.shape, score.shape[-1], dtype=torch.int32, device=score.device)
    padded = [(slice(row, row + 1), cut) for row, cut in enumerate(padding)]
    for rows, cut in padded if any(padding) else [(slice(None), 0)]:
        part = score[rows, :, cut:]
        places = torch.arange(part.shape[-1], dtype=torch.int32, device=score.device).expand_as(part)
        order = part.sort(dim=-1, descending=True).indices
        ranks[rows, :, cut:] = torch.empty_like(places, memory_format=torch.contiguous_format).scatter_(-1, order, places)
    return ranks


def _configured_redundancy(
    config: MixKVConfig, layer_idx: int, num_layers: int, found: scores.Directions, part: Slice
) -> torch.Tensor:
    if config.redundancy == "online":
        return scores.redundancy(found)
    table, heads = config.redundancy, part.total
    if len(table) != num_layers or len(table[0]) != heads:
        raise ValueError(
            f"the redundancy table has shape [{len(table)}, {len(table[0])}], but the model has {num_layers} compressed layers "
            f"of {heads} KV heads: give a table [{num_layers}, {heads}] or 'online'"
        )
    return part.own(torch.tensor(table[layer_idx]))


def _forced(lengths: torch.Tensor, real: torch.Tensor, window: int) -> torch.Tensor:
    fixed = real.clamp(max=window)
    if lengths.shape != real.shape or (lengths < fixed).any() or (lengths > real).any():
        raise ValueError(
            f"lengths {lengths.tolist()} must have shape {list(real.shape)} and lie between the window's real tokens "
            f"{fixed.tolist()} and all real tokens {real.tolist()}"
        )
    return lengths - fixed


def _valid(attention_mask: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    batch, heads, length, _ = key.shape
    if attention_mask is None:
        return torch.ones(1, 1, length, dtype=torch.bool, device=key.device)
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
