"""The matplotlib Axes of a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes(ax: Axes | None, width: float, height: float) -> Axes:
    """``ax``, or the Axes of a new figure of ``width`` x ``height`` inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'mixkv[plot]'") from error
    return pyplot.subplots(figsize=(width, height))[1] if ax is None else ax
