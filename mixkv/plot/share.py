"""The share of KV heads that keep a token, and how a share is shaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

TICKS = (0, 0.05, 0.2, 0.5, 1)


def kept_by_head(cache, layer: int | None, head: int | None, row: int) -> list[list[torch.Tensor]]:
    """The positions that each of the chosen KV heads keeps, of every batch row: [B][heads] tensors.

    Args:
        layer, head: one layer, one KV head of each layer; None: all.
        row: the batch row that will be read.

    Raises:
        ValueError: the cache is empty, or has no such row, layer or head.
    """
    found = {index: kept for index, kept in enumerate(map(cache.kept, range(len(cache.layers)))) if kept}
    if not found:
        raise ValueError("this cache is empty: let a model read a prompt with it first")
    if layer is not None and layer not in found:
        raise ValueError(f"layer={layer} is not compressed; choose from {list(found)}")
    chosen = [kept for index, kept in found.items() if layer in (None, index)]
    batch, heads = len(chosen[0]), max(len(kept[0]) for kept in chosen)
    if not 0 <= row < batch:
        raise ValueError(f"row={row} must be from 0 to {batch - 1}: the cache holds a batch of {batch}")
    if head is not None and not 0 <= head < heads:
        raise ValueError(f"head={head} must be from 0 to {heads - 1}: there are {heads} KV heads")
    own = slice(None) if head is None else slice(head, head + 1)
    return [[part for kept in chosen for part in kept[index][own]] for index in range(batch)]


def share(heads: list[torch.Tensor], tokens: int) -> torch.Tensor:
    """The share of ``heads`` (the positions that each keeps) that keep each of the first ``tokens`` tokens: float32 [tokens]."""
    total = torch.zeros(tokens)
    for positions in heads:
        total[positions[positions < tokens].cpu().long()] += 1
    return total / len(heads)


def strength(share: float) -> float:
    """How strongly a share is drawn, from 0 to 1: its square root, because most tokens are kept by a small share of all heads."""
    return share**0.5


def scale(colours: Sequence, evicted=None) -> ScalarMappable:
    """The colours of shares from 0 to 1, of which matplotlib draws a colour bar.

    Args:
        colours: those of a `strength` of 0 to 1, evenly spaced.
        evicted: a colour of its own for what no head keeps.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    shades = LinearSegmentedColormap.from_list("share", colours)
    if evicted is not None:
        shades = shades.with_extremes(under=evicted)
        shades.colorbar_extend = "min"
    return ScalarMappable(PowerNorm(0.5, 0, 1), shades)


def colour_bar(figure: Figure, shades: ScalarMappable, label: str, **options) -> Colorbar:
    """A colour bar of a `scale`; a colour of its own for what is evicted is a box before it."""
    bar = figure.colorbar(shades, label=label, extendrect=True, extendfrac=0.08, **options)
    bar.set_ticks(TICKS, labels=["0 (evicted)", *(f"{tick:.0%}" for tick in TICKS[1:-1]), "all"])
    bar.ax.minorticks_off()
    return bar
