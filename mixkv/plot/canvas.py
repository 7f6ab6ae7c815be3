"""The Axes that pictures are drawn on: given, or those of a new figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def import_pyplot():
    """matplotlib's pyplot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'mixkv[plot]'") from error
    return pyplot


def axes(ax: Axes | None, width: float, height: float, layout: str = "constrained") -> Axes:
    """``ax``, or the Axes of a new figure of ``width`` x ``height`` inches.

    Args:
        layout: matplotlib's layout engine, which makes room for titles and labels: ``compressed`` for images.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = import_pyplot()
    return pyplot.subplots(figsize=(width, height), layout=layout)[1] if ax is None else ax
