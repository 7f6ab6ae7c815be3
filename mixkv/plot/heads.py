"""Heat maps with a layer per row and a KV head per column: entries kept, redundancy of the keys, sparsity of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import registry
from .canvas import axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def budgets(cache, *, row: int = 0, ax: Axes | None = None) -> Axes:
    """Draws how many entries every KV head of every layer keeps; layers that are not compressed are left blank.

    Args:
        cache: a `MixKVCache` that has read a prompt.
        row: the batch row.
        ax: where to draw; a new figure by default.

    Returns: the Axes.

    Raises:
        ValueError: the cache is empty, or has no such row.
        ImportError: matplotlib is not installed.
    """
    return _heat_map(grid(cache.stats()["lengths"], row), "entries kept", ax)


def redundancy(cache, *, row: int = 0, ax: Axes | None = None) -> Axes:
    """Draws the redundancy of every KV head's keys as measured on the prompt, from 0 to 1; otherwise as `budgets`.

    The more redundant a head is, the more weight the ``mix`` score gives to diversity.
    """
    return _heat_map(grid(cache.stats()["redundancy"], row), "redundancy of the keys", ax, highest=1.0)


def sparsity(cache, *, row: int = 0, ax: Axes | None = None) -> Axes:
    """Draws the sparsity of every KV head's attention as ``hybridkv`` measured it, from 0 to 1; otherwise as `budgets`.

    Dynamic heads, which keep all entries in chunks, have a dot.

    Raises:
        ValueError: another method's cache.
    """
    numbers = cache.stats()
    if not registry.method(numbers["method"]).keeps_chunks:
        able = [name for name, method in registry.METHODS.items() if method.keeps_chunks]
        raise ValueError(
            f"method={numbers['method']!r} does not classify heads: read the prompt with a method that does ({', '.join(able)})"
        )
    ax = _heat_map(grid(numbers["sparsity"], row), "sparsity of attention", ax, highest=1.0)
    dynamic = grid(numbers["dynamic"], row)
    layers, heads = (dynamic == 1).nonzero(as_tuple=True)
    ax.scatter(heads.tolist(), layers.tolist(), s=9, color="white", edgecolor="black", linewidth=0.5, label="dynamic head")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8, frameon=False)
    return ax


def grid(layers: list[torch.Tensor | None], row: int) -> torch.Tensor:
    """One batch row of numbers [B, Hkv] a layer: float32 [layers, most KV heads], NaN where there is none.

    Raises:
        ValueError: there are no numbers, or no such row.
    """
    rows = [None if layer is None or not len(layer) else layer for layer in layers]
    batch = max((len(layer) for layer in rows if layer is not None), default=0)
    if not batch:
        raise ValueError("this cache is empty: let a model read a prompt with it first")
    if not 0 <= row < batch:
        raise ValueError(f"row={row} must be from 0 to {batch - 1}: the cache holds a batch of {batch}")
    found = torch.full((len(rows), max(layer.shape[1] for layer in rows if layer is not None)), torch.nan)
    for index, layer in enumerate(rows):
        if layer is not None:
            found[index, : layer.shape[1]] = layer[row].float()
    return found


def _heat_map(numbers: torch.Tensor, label: str, ax: Axes | None, highest: float | None = None) -> Axes:
    layers, heads = numbers.shape
    ax = axes(ax, 2.4 + 0.25 * heads, 1.0 + 0.16 * max(layers, 8))
    # A Python list: arrays of torch and matplotlib need not agree on a numpy version.
    image = ax.imshow(numbers.tolist(), aspect="auto", cmap="viridis", vmin=0, vmax=highest, interpolation="nearest")
    ax.set_xlabel("KV head")
    ax.set_ylabel("layer")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax
