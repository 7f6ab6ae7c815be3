"""Whole numbers near shares, with exact totals."""

from __future__ import annotations

import torch


def apportion(shares: torch.Tensor, total: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Whole numbers near ``shares`` that sum to ``total`` and stay within ``limit``: largest-remainder rounding.

    Args:
        shares: [..., H] float, >= 0, summing to about ``total``.
        total: [...] int, at most ``limit.sum(-1)``.
        limit: [..., H] int.

    Returns: [..., H] int64.
    """
    shares, room = shares.double(), limit.double()
    # Each pass hands the surplus of full heads to the rest in proportion to their shares; one more head fills up a pass.
    for _ in range(shares.shape[-1]):
        if not (shares > room).any():
            break
        open_heads = (shares < room).double()
        surplus = (shares - room).clamp(min=0).sum(-1, keepdim=True)
        weight = (shares + 1e-9) * open_heads
        shares = shares.minimum(room) + surplus * weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
    shares = shares.minimum(room)
    # Shares such as 95.99999999 mean 96: rounding noise must not decide who gets the remainder.
    whole = (shares + 1e-6).floor().minimum(room)
    missing = total.double().unsqueeze(-1) - whole.sum(-1, keepdim=True)
    fraction = (shares - whole).masked_fill(whole >= room, -1.0)
    rank = fraction.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (whole + (rank < missing)).long()


def total_rows(base: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    return (base * candidates.shape[-1]).minimum(candidates.sum(-1))
