"""Refitting: the values of kept rows change so that attention over them returns what it returned over all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..ops.arguments import LogitOptions

# Ridges to choose from, as multiples of the mean squared length of the reference queries' weights.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Reference queries are held out in so many blocks of consecutive tokens.
FOLDS = 4


@dataclass(frozen=True)
class Reference:
    """Queries whose outputs over all rows are known.

    Attributes:
        query: [B, Hq, n, D], rotated as the model uses them.
        output: [B, n, Hq, Dv], their attention over all rows of the prompt that they see.
        first: position of the first query; each sees the rows up to its own position. None: each sees all rows.
        valid: bool [B, n], False for padding, which does not count; None: there is none.
    """

    query: torch.Tensor
    output: torch.Tensor
    first: int | None = None
    valid: torch.Tensor | None = None


def attention_output(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    logits: LogitOptions,
    *,
    after: bool = False,
) -> torch.Tensor:
    """Attention of n queries [B, Hq, n, D] over a prompt's keys and values [B, Hkv, N, D]: [B, n, Hq, Dv].

    Args:
        valid: bool [B, N], False for padding; None: there is none.
        after: whether the queries come after the prompt and see all of it; else they are its last ones.
    """
    length, heads, tokens = key.shape[2], key.shape[1], query.shape[2]
    query, sinks = _by_token(query, heads), _sinks(logits, heads, tokens)
    own = torch.arange(length - tokens, length, device=key.device).repeat_interleave(query.shape[2] // tokens)
    seen = (torch.arange(length, device=key.device) <= own.unsqueeze(1)) | after
    seen = seen if valid is None else seen & valid[:, None, None]
    output = torch.empty(*query.shape[:3], value.shape[-1], device=key.device)
    # One head at a time: its weights are as large as its keys.
    for head in range(heads):
        one = slice(head, head + 1)
        weights = _softmax(query[:, one], key[:, one], seen, logits, None if sinks is None else sinks[:, one])
        output[:, one] = weights @ value[:, one].float()
    return output.unflatten(2, (tokens, -1)).transpose(1, 2).flatten(2, 3).to(value.dtype)


def refit(
    references: Sequence[Reference],
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor,
    held: torch.Tensor,
    logits: LogitOptions,
) -> torch.Tensor:
    """Values with which attention over the kept rows is closest to attention over all rows, for the reference queries.

    With A the weights [R, L] that the R queries of a head's group give to its kept rows, V the rows' values and O the outputs,
    ridge regression around V gives ``V + A^T (A A^T + mu I)^-1 (O - A V)`` (after Attention Matching, arXiv 2602.16284). The
    ridge mu is the one of `RIDGES` with the smallest error on queries that were held out. A head in which none has a smaller
    error than V keeps its values to the bit.

    Args:
        references: the queries. Every set counts the same, however many queries it has.
        key, value: [B, Hkv, L, D] and [B, Hkv, L, Dv], the kept rows.
        position: int [B, Hkv, L], the rows' positions in the prompt.
        held: bool [B, Hkv, L], False where there is no row.
        logits: how the model computes its logits.

    Returns: [B, Hkv, L, Dv], in ``value``'s dtype.
    """
    key, fitted = key.float(), value.float()
    parts = [_weights_and_errors(reference, key, fitted, position, held, logits) for reference in references]
    # Folds are consecutive, each with some queries of every set.
    weights, error = (torch.cat(part, dim=3).flatten(2, 3) for part in zip(*parts))
    kernel = weights @ weights.transpose(-1, -2)
    squares = kernel.diagonal(dim1=-2, dim2=-1)
    scale = squares.sum(dim=-1) / (squares > 0).sum(dim=-1).clamp(min=1)
    best, dual = error.square().sum(dim=(-2, -1)), torch.zeros_like(error)
    better = torch.zeros_like(best, dtype=torch.bool)
    identity = torch.eye(kernel.shape[-1], device=kernel.device)
    for ridge in RIDGES:
        added = (ridge * scale).clamp(min=1e-30)[..., None, None] * identity
        factor, failed = torch.linalg.cholesky_ex(kernel + added)
        inverse = torch.cholesky_inverse(factor)
        solution = inverse @ error
        found = _held_out_error(inverse, solution)
        wins = (found < best) & (failed == 0)
        best, dual = torch.where(wins, found, best), torch.where(wins[..., None, None], solution, dual)
        better |= wins
    fitted = fitted + weights.transpose(-1, -2) @ dual
    return torch.where(better[..., None, None], fitted.to(value.dtype), value)


def _weights_and_errors(
    reference: Reference,
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor,
    held: torch.Tensor,
    logits: LogitOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [B, Hkv, FOLDS, R, L] and missing outputs [B, Hkv, FOLDS, R, Dv], scaled so that every set counts the same.

    Folds are filled up with zeros, which change no solution.
    """
    batch, heads = key.shape[:2]
    tokens = reference.query.shape[2]
    query = _by_token(reference.query, heads)
    output = reference.output.float().unflatten(2, (heads, -1)).transpose(1, 2).flatten(2, 3)
    groups = query.shape[2] // tokens
    seen = held.unsqueeze(2)
    if reference.first is not None:
        own = reference.first + torch.arange(tokens, device=key.device)
        seen = seen & (position.unsqueeze(2) <= own.repeat_interleave(groups).unsqueeze(1))
    weights = _softmax(query, key, seen, logits, _sinks(logits, heads, tokens))
    error = output - weights @ value
    real = key.new_ones(batch, tokens) if reference.valid is None else reference.valid.float()
    counts = (real / real.sum(dim=-1, keepdim=True).clamp(min=1)).sqrt().repeat_interleave(groups, dim=-1)[:, None, :, None]
    missing = -tokens % FOLDS * groups
    weights, error = (F.pad(part * counts, (0, 0, 0, missing)) for part in (weights, error))
    return weights.unflatten(2, (FOLDS, -1)), error.unflatten(2, (FOLDS, -1))


def _by_token(query: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries [B, Hq, n, D] as [B, Hkv, n * G, D] float32: token after token, each with the G query heads of a KV head."""
    return query.float().unflatten(1, (heads, -1)).transpose(2, 3).flatten(2, 3)


def _sinks(logits: LogitOptions, heads: int, tokens: int) -> torch.Tensor | None:
    """The sink logits of `_by_token`'s queries, [1, Hkv, n * G, 1]."""
    if logits.sinks is None:
        return None
    return logits.sinks.float().view(1, heads, 1, -1).expand(-1, -1, tokens, -1).flatten(2).unsqueeze(-1)


def _softmax(
    query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, logits: LogitOptions, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Weights [B, H, R, L] that queries [B, H, R, D] give to keys [B, H, L, D]; 0 for a query that sees nothing."""
    products = query @ key.float().transpose(-1, -2) * logits.scaling
    if logits.softcap is not None:
        products = logits.softcap * torch.tanh(products / logits.softcap)
    products = products.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        products = torch.cat([products, sinks.expand(*products.shape[:3], 1)], dim=-1)
    return products.softmax(dim=-1).nan_to_num(0.0)[..., : key.shape[2]]


def _held_out_error(inverse: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """Squared error on every fold of the fit to all other folds, summed: [B, Hkv].

    The residual of held-out rows b is ``(G_bb)^-1 (G E)_b`` with G the inverse [B, Hkv, R, R] of the regularised kernel and
    ``solution`` = G E.
    """
    size = inverse.shape[-1] // FOLDS
    blocks = inverse.unflatten(-1, (FOLDS, size)).unflatten(-3, (FOLDS, size)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    return torch.linalg.solve_ex(blocks, solution.unflatten(-2, (FOLDS, size)))[0].square().sum(dim=(-3, -2, -1))
