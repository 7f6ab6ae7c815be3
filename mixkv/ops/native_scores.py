"""The compiled operations that scores are made of. Contracts: `mixkv.ops.score_reference` and `mixkv.ops.mixing_reference`."""

from __future__ import annotations

import torch

from .arguments import LogitOptions
from .native import float_sinks, operations


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    logits: LogitOptions,
    *,
    statistic: str = "mean",
    group_reduce: str = "mean",
) -> torch.Tensor:
    """`score_reference.window_attention`, a few columns at a time instead of all logits at once."""
    valid = _expanded(valid, key)
    options = (logits.scaling, statistic == "rms", group_reduce == "max", logits.softcap or 0.0, float_sinks(logits.sinks))
    return operations().window_scores.default(query, key, valid, *options)


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
) -> torch.Tensor:
    """`score_reference.importance` on the CPU."""
    options = (
        logits.scaling,
        group_reduce == "max",
        logits.softcap or 0.0,
        float_sinks(logits.sinks),
        kernel_size,
        pooling == "max",
    )
    return operations().importance.default(query, key, value, factor, _expanded(valid, key), *options)


def norm(rows: torch.Tensor) -> torch.Tensor:
    """`score_reference.norm` on the CPU."""
    return operations().row_norms.default(rows)


def diversity(key: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`score_reference.diversity` on the CPU; the same for a padded prompt as for the prompt alone, to the bit."""
    return operations().diversity.default(key, _expanded(valid, key))


def mix(
    importance: torch.Tensor,
    similarity: torch.Tensor,
    value_norm: torch.Tensor,
    share: torch.Tensor,
    valid: torch.Tensor | None,
) -> torch.Tensor:
    """`mixing_reference.mix` on the CPU."""
    valid = None if valid is None else valid.expand_as(importance)
    return operations().mix.default(importance, similarity, value_norm, share, valid)


def normalized(importance: torch.Tensor, exponent: float) -> torch.Tensor:
    """`mixing_reference.normalized` of float32 on the CPU."""
    return operations().normalized.default(importance, exponent)


def match(raw: torch.Tensor, reference: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """`mixing_reference.match` of float32 tensors on the CPU; the same for a padded prompt as for the prompt alone, to the bit."""
    return operations().match.default(raw, reference, None if valid is None else valid.expand_as(raw))


def _expanded(valid: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor | None:
    return None if valid is None else valid.expand(key.shape[:3])
