"""Whole numbers near shares, with exact totals: a few numbers a layer, in float64 on the host (some devices have no float64)."""

from __future__ import annotations

import numpy as np
import torch


def to_host(*parts: torch.Tensor) -> list[np.ndarray]:
    """Integer tensors as int64 arrays on the host, in one transfer from their device."""
    if all(part.device.type == "cpu" for part in parts):
        return [part.long().numpy() for part in parts]
    flat = torch.cat([part.flatten().long() for part in parts]).cpu()
    return [piece.view(part.shape).numpy() for piece, part in zip(flat.split([part.numel() for part in parts]), parts)]


def to_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """An int64 array of the host as a tensor on ``device``."""
    return torch.tensor(rows, device=device)


def apportion(shares: np.ndarray, total: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Whole numbers near ``shares`` that sum to ``total`` and stay within ``limit``: largest-remainder rounding.

    Args:
        shares: [..., H] float64, >= 0, summing to about ``total``.
        total: [...] int, at most ``limit.sum(-1)``.
        limit: [..., H] int.

    Returns: [..., H] int64.
    """
    shares, room = np.asarray(shares, dtype=np.float64), np.asarray(limit, dtype=np.float64)
    # Each pass hands the surplus of full heads to the rest in proportion to their shares; one more head fills up a pass.
    for _ in range(shares.shape[-1]):
        if not (shares > room).any():
            break
        surplus = (shares - room).clip(min=0).sum(-1, keepdims=True)
        weight = (shares + 1e-9) * (shares < room)
        shares = np.minimum(shares, room) + surplus * weight / weight.sum(-1, keepdims=True).clip(min=1e-30)
    shares = np.minimum(shares, room)
    # Shares such as 95.99999999 mean 96: rounding noise must not decide who gets the remainder.
    whole = np.minimum(np.floor(shares + 1e-6), room)
    missing = np.asarray(total, dtype=np.float64)[..., None] - whole.sum(-1, keepdims=True)
    fraction = np.where(whole >= room, -1.0, shares - whole)
    rank = (-fraction).argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
    return (whole + (rank < missing)).astype(np.int64)


def level(total: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """``total`` [B] in parts that are equal, but for those that their ``limit`` [B, H] int holds below: float64 [B, H]."""
    ordered = np.sort(limit, axis=-1)
    size = ordered.shape[-1]
    # With the i lowest at their limits, the others share what is left.
    below = np.concatenate([np.zeros_like(ordered[:, :1]), ordered.cumsum(axis=-1)[:, :-1]], axis=-1)
    height = (total[:, None] - below) / (size - np.arange(size))
    reached = (height <= ordered).argmax(axis=-1)
    return np.minimum(limit, np.take_along_axis(height, reached[:, None], axis=-1)).astype(np.float64)


def total_rows(base: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The candidate rows [B] that heads keep together: ``base`` [B] on average, of ``candidates`` [B, H]."""
    return np.minimum(base * candidates.shape[-1], candidates.sum(-1))
