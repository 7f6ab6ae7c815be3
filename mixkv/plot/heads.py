"""Heat maps of layers x KV heads: KV entries kept, redundancy of the keys, sparsity of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import registry
from .canvas import axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def budgets(cache, *, row: int = 0, ax: Axes | None = None) -> Axes:
    """Draws the number of KV entries that each KV head of each layer keeps; layers that are not compressed are blank.

    Args:
        cache: a `MixKVCache` that has read a prompt.
        row: the batch row.
        ax: where to draw; a new figure by default.

    Returns: the Axes.

    Raises:
        ValueError: the cache is empty, or has no such row.
        ImportError: matplotlib is not installed.
    """
    return _heat_map(grid(cache.stats()["lengths"], row), "KV entries kept", ax)


def redundancy(cache, *, row: int = 0, ax: Axes | None = None) -> Axes:
    """Draws the redundancy of each KV head's keys in the prompt, in [0, 1]. Arguments and errors are those of `budgets`.

    The ``mix`` score weights diversity by the redundancy of a head.
    """
    return _heat_map(grid(cache.stats()["redundancy"], row), "redundancy", ax, highest=1.0)


def sparsity(cache, *, row: int = 0, ax: Axes | None = None) -> Axes:
    """Draws the sparsity of each KV head's attention as ``hybridkv`` measured it, in [0, 1], with dots on its dynamic heads.

    Arguments and errors are those of `budgets`, and:

    Raises:
        ValueError: the cache is of a method that does not classify heads.
    """
    numbers = cache.stats()
    if not registry.method(numbers["method"]).keeps_chunks:
        those = [name for name, method in registry.METHODS.items() if method.keeps_chunks]
        raise ValueError(
            f"method={numbers['method']!r} does not classify heads: read the prompt with a method that does ({', '.join(those)})"
        )
    ax = _heat_map(grid(numbers["sparsity"], row), "sparsity (dots: dynamic heads)", ax, highest=1.0)
    dynamic = grid(numbers["dynamic"], row)
    layers, heads = (dynamic == 1).nonzero(as_tuple=True)
    ax.scatter(heads.tolist(), layers.tolist(), s=9, color="white", edgecolor="black", linewidth=0.5)
    return ax


def grid(layers: list[torch.Tensor | None], row: int) -> torch.Tensor:
    """The numbers of one batch row, from a tensor [B, Hkv] per layer: float32 [layers, max. KV heads], NaN where there is none.

    Raises:
        ValueError: there are no numbers, or no such row.
    """
    rows = [None if layer is None or not len(layer) else layer for layer in layers]
    batch = max((len(layer) for layer in rows if layer is not None), default=0)
    if not batch:
        raise ValueError("this cache is empty: run a model on a prompt with it first")
    if not 0 <= row < batch:
        raise ValueError(f"row={row} must be from 0 to {batch - 1}: the batch size of this cache is {batch}")
    found = torch.full((len(rows), max(layer.shape[1] for layer in rows if layer is not None)), torch.nan)
    for index, layer in enumerate(rows):
        if layer is not None:
            found[index, : layer.shape[1]] = layer[row].float()
    return found


def _heat_map(numbers: torch.Tensor, label: str, ax: Axes | None, highest: float | None = None) -> Axes:
    layers, heads = numbers.shape
    ax = axes(ax, 2.2 + 0.25 * heads, 1.0 + 0.16 * max(layers, 8))
    # As a Python list, because torch and matplotlib may use different versions of numpy.
    image = ax.imshow(numbers.tolist(), aspect="auto", cmap="viridis", vmin=0, vmax=highest, interpolation="nearest")
    ax.set_xlabel("KV head")
    ax.set_ylabel("layer")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax
