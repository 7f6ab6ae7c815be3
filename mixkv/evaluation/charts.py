"""Results as a picture. matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import InputError

# The panels: the title of each, and its number in a record of `bench.run`.
_PANELS: tuple[tuple[str, Callable[[dict[str, Any]], float | None]], ...] = (
    ("decode step, ms", lambda record: 1e3 * record["step_seconds"]),
    ("first token, s", lambda record: record["first_token_seconds"]),
    ("size of the cache, MiB", lambda record: record["bytes"] / 2**20),
    ("peak during prefill, MiB", lambda record: None if record["peak_bytes"] is None else record["peak_bytes"] / 2**20),
)


def check(path: str, option: str = "--plot") -> None:
    """Checks, before minutes of work, that a picture can be drawn and written to ``path``.

    Raises:
        InputError: matplotlib is not installed or does not write such files, or the folder does not exist.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"{option} {path} needs matplotlib: pip install 'mixkv[plot]'")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() not in known:
        raise InputError(f"{option} {path} must end in one of {', '.join('.' + name for name in sorted(known))}")
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise InputError(f"{option} {path} cannot be written: there is no folder {folder}")


def bench(records: list[dict[str, Any]], path: str, title: str) -> None:
    """Draws the records of `bench.run` against the prompt length: a row of panels for each batch size, a line for each cache.

    Raises:
        InputError: ``path`` cannot be written.
    """
    from matplotlib.figure import Figure

    batches = sorted({record["batch"] for record in records})
    lengths = sorted({record["prompt_tokens"] for record in records if record["method"] != "floor"})
    figure = Figure(figsize=(3.6 * len(_PANELS), 0.5 + 3.2 * len(batches)), layout="constrained")
    grid = figure.subplots(len(batches), len(_PANELS), squeeze=False)
    for batch, panels in zip(batches, grid):
        for (name, number), axes in zip(_PANELS, panels):
            _panel(axes, [record for record in records if record["batch"] == batch], number, lengths)
            axes.set_title(name if len(batches) == 1 else f"{name} (batch {batch})")
    grid[0][0].legend()
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"--plot {path} cannot be written: {error.strerror}") from error


def _panel(axes, records: list[dict[str, Any]], number: Callable, lengths: list[int]) -> None:
    for method in dict.fromkeys(record["method"] for record in records):
        points = [(record["prompt_tokens"], number(record)) for record in records if record["method"] == method]
        if any(value is None for _, value in points):
            continue
        if method == "floor":
            axes.axhline(points[0][1], color="gray", linestyle=":", label=f"floor: full cache of {points[0][0]:,} tokens")
            continue
        style = {"color": "black", "linewidth": 2} if method == "full" else {"linewidth": 1.2}
        axes.plot(*zip(*points), marker="o", label=method, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompt, tokens")


def patches(model, reading, configs: list, path: str) -> None:
    """Draws the first image of a `prompts.Reading` with the patches that are kept under each configuration, side by side.

    Raises:
        InputError: ``path`` cannot be written.
    """
    from matplotlib.figure import Figure

    from ..plot.patches import kept_patches, patch_legend
    from .measure import read_prompt

    image = reading.images[0]
    figure = Figure(figsize=(5 * len(configs), 1.7 + 4.9 * image.height / image.width), layout="compressed")
    panels = figure.subplots(1, len(configs), squeeze=False)[0]
    for axes, config in zip(panels, configs):
        cache = read_prompt(model, reading.input_ids, config, inputs=reading.inputs).cache
        inputs = {"input_ids": reading.input_ids, **reading.inputs}
        kept_patches(cache, reading.images, inputs, model.config, legend=False, ax=axes)
        kept = axes.get_title().split("\n", 1)[1]
        axes.set_title(f"{config.method}, {config.score}, budget {config.budget}\n{kept}", fontsize=11)
    patch_legend(panels)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise InputError(f"--picture {path} cannot be written: {error.strerror}") from error
