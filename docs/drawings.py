"""Draws the pictures of docs/how-it-works.md and docs/architecture.md: python docs/drawings.py [--png FOLDER]"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle  # noqa: E402

FIGURES = Path(__file__).resolve().parent / "figures"
KEPT, WINDOW, EVICTED, INK, PLAIN, OUTSIDE = "#2f6fb0", "#17406d", "#e3e8ee", "#1c2733", "#f4f6f9", "#d9a441"


def canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """A figure of this size in inches, with axes in the same units."""
    figure = plt.figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return figure, ax


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str = PLAIN, size: int = 9) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06", fc=colour, ec=INK, lw=0.8)
    ax.add_patch(shape)
    light = colour in (KEPT, WINDOW)
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size, color="white" if light else INK)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", side: str = "above") -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK, lw=1, shrinkA=0, shrinkB=0))
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        place = {
            "above": dict(ha="center", va="bottom", xytext=(0, 3)),
            "right": dict(ha="left", va="center", xytext=(5, 0)),
            "below": dict(ha="center", va="top", xytext=(0, -3)),
        }[side]
        ax.annotate(text, (x, y), textcoords="offset points", size=8, color=INK, **place)


def cells(ax: Axes, x: float, y: float, colours: list[str], side: float = 0.16) -> None:
    for index, colour in enumerate(colours):
        ax.add_patch(Rectangle((x + index * side, y), side, side, fc=colour, ec="white", lw=0.8))


def label(ax: Axes, x: float, y: float, text: str, **style) -> None:
    ax.text(x, y, text, **{"size": 9, "color": INK, "va": "center", **style})


def legend(ax: Axes, x: float, y: float, entries: list[tuple[str, str]]) -> None:
    for colour, text in entries:
        cells(ax, x, y - 0.08, [colour])
        label(ax, x + 0.24, y, text)
        x += 0.45 + 0.078 * len(text)


def storage() -> plt.Figure:
    """Heads keep different numbers of tokens, one after the other in one buffer."""
    figure, ax = canvas(8.2, 3.3)
    label(ax, 0.2, 0.25, "The prompt, seen by three KV heads of a layer", weight="bold")
    chance, lengths = random.Random(4), []
    for head, kept in enumerate((9, 4, 14)):
        chosen = set(chance.sample(range(32), kept))
        colours = [WINDOW if p >= 32 else KEPT if p in chosen else EVICTED for p in range(38)]
        lengths.append(kept + 6)
        label(ax, 0.2, 0.62 + 0.26 * head, f"head {head}")
        cells(ax, 1.0, 0.54 + 0.26 * head, colours)
        label(ax, 1.0 + 38 * 0.16 + 0.12, 0.62 + 0.26 * head, f"keeps {kept + 6}")
    arrow(ax, (4.0, 1.34), (4.0, 1.72), "the kept keys and values are copied, the rest is freed", "right")
    label(ax, 0.2, 1.95, "The buffer of the layer", weight="bold")
    x = 0.2
    for head, length in enumerate(lengths):
        cells(ax, x, 2.12, [KEPT] * (length - 6) + [WINDOW] * 6 + ["white"] * 2, side=0.148)
        ax.add_patch(Rectangle((x, 2.12), (length + 2) * 0.148, 0.148, fill=False, ec=INK, lw=0.9))
        label(ax, x, 2.45, f"head {head}", size=8)
        x += (length + 2) * 0.148 + 0.06
    entries = [(KEPT, "kept"), (WINDOW, "observation window"), (EVICTED, "evicted"), ("white", "free, for the next tokens")]
    legend(ax, 0.2, 2.95, entries)
    ax.add_patch(Rectangle((ax.patches[-1].get_x(), 2.87), 0.16, 0.16, fill=False, ec=INK, lw=0.8))
    return figure


def walk() -> plt.Figure:
    """One prompt and one decode step through the library."""
    figure, ax = canvas(8.6, 4.9)
    box(ax, 0.2, 0.2, 1.9, 0.5, "generate")
    box(ax, 3.0, 0.2, 2.2, 0.5, "decoder layer: q, k, v")
    box(ax, 6.2, 0.2, 2.2, 0.5, "MixKVCache.update")
    arrow(ax, (2.1, 0.45), (3.0, 0.45))
    arrow(ax, (5.2, 0.38), (6.2, 0.38), "k, v")
    arrow(ax, (6.2, 0.58), (5.2, 0.58), "k, v, marked", "below")
    box(ax, 3.0, 1.2, 2.2, 0.5, "attention function\n(hf/attention.py)", size=8)
    arrow(ax, (4.1, 0.7), (4.1, 1.2))
    label(ax, 0.2, 2.0, "While the prompt is read", weight="bold")
    label(ax, 8.4, 2.0, "In a decode step", weight="bold", ha="right")
    arrow(ax, (3.6, 1.7), (2.2, 2.25))
    arrow(ax, (4.6, 1.7), (6.0, 2.25))
    box(ax, 0.2, 2.25, 4.3, 0.4, "base attention over all keys and values")
    box(ax, 0.2, 2.9, 2.0, 0.5, "a score\nranks the tokens", size=8)
    box(ax, 2.5, 2.9, 2.0, 0.5, "a method\nallocates the budget", size=8)
    box(ax, 0.2, 3.65, 4.3, 0.4, "storage copies what is kept; the rest is freed")
    arrow(ax, (2.35, 2.65), (1.4, 2.9))
    arrow(ax, (2.2, 3.15), (2.5, 3.15))
    arrow(ax, (3.5, 3.4), (2.9, 3.65))
    box(ax, 5.3, 2.25, 3.1, 0.4, "append the new key and value in place")
    box(ax, 5.3, 2.9, 3.1, 0.5, "attend over what each head keeps")
    arrow(ax, (6.85, 2.65), (6.85, 2.9))
    box(
        ax,
        0.2,
        4.4,
        8.2,
        0.36,
        "RaggedStore: key, value, position in flat buffers; where each head starts, and its length",
        KEPT,
    )
    arrow(ax, (2.35, 4.05), (2.35, 4.4))
    arrow(ax, (6.5, 3.4), (6.5, 4.4))
    arrow(ax, (7.2, 4.4), (7.2, 3.4))
    return figure


def global_budget() -> plt.Figure:
    """What is held while layers are read one by one under method="global"."""
    figure, ax = canvas(8.2, 2.9)
    steps = [
        ("layer 0 is read", (12,)),
        ("layer 1 is read", (9, 12)),
        ("layer 2 is read", (6, 11, 12)),
        ("at the end", (4, 9, 5)),
    ]
    for column, (title, held) in enumerate(steps):
        x = 0.2 + 2.02 * column
        label(ax, x, 0.25, title, weight="bold")
        for layer, kept in enumerate(held):
            fresh = column < 3 and layer == len(held) - 1
            cells(ax, x, 0.5 + 0.5 * layer, [OUTSIDE if fresh else KEPT] * kept + [EVICTED] * (12 - kept), side=0.145)
            label(ax, x, 0.78 + 0.5 * layer, f"layer {layer}", size=8)
        if column < 3:
            arrow(ax, (x + 1.78, 1.3), (x + 1.98, 1.3))
    legend(
        ax, 0.2, 2.3, [(OUTSIDE, "all keys and values of the layer being read"), (KEPT, "kept so far"), (EVICTED, "evicted")]
    )
    label(
        ax,
        0.2,
        2.65,
        "A layer's share can only shrink as later layers arrive, so what is evicted early would be evicted in the end.",
    )
    return figure


def hybrid() -> plt.Figure:
    """A pruned head and a head with chunks."""
    figure, ax = canvas(8.2, 3.2)
    label(ax, 0.2, 0.25, "A static head: its attention rests on the first tokens and the window", weight="bold")
    static = [KEPT] * 4 + [KEPT if p in (9, 17, 25) else EVICTED for p in range(4, 32)] + [WINDOW] * 8
    cells(ax, 0.2, 0.42, static)
    label(ax, 6.75, 0.5, "pruned")
    label(ax, 0.2, 1.0, "A dynamic head: it looks in many places", weight="bold")
    cells(ax, 0.2, 1.17, [KEPT] * 4 + [OUTSIDE] * 32 + [WINDOW] * 4)
    label(ax, 6.75, 1.25, "keeps everything")
    for chunk in range(4):
        ax.add_patch(Rectangle((0.2 + 0.16 * (4 + 8 * chunk), 1.13), 8 * 0.16, 0.24, fill=False, ec=INK, lw=1))
        label(ax, 0.2 + 0.16 * (8 + 8 * chunk), 1.5, f"chunk {chunk}", size=8, ha="center")
    box(ax, 0.2, 1.95, 3.0, 0.46, "bounds of the keys of each chunk,\nresident", size=8)
    box(ax, 3.9, 1.95, 1.7, 0.46, "the query of\nthis step", size=8)
    arrow(ax, (3.9, 2.18), (3.2, 2.18))
    arrow(ax, (3.0, 1.95), (3.0, 1.62), "chunks are chosen", "right")
    label(ax, 0.2, 2.62, "A step attends to the resident tokens and the chosen chunks.")
    legend(
        ax,
        0.2,
        2.95,
        [(KEPT, "resident"), (WINDOW, "last tokens, resident"), (OUTSIDE, "outside, in chunks"), (EVICTED, "evicted")],
    )
    return figure


def rooms() -> plt.Figure:
    """The packages of the library; each imports only from those below."""
    figure, ax = canvas(8.9, 4.7)
    lines = [
        ["cli", "harness", "evaluation", "plot", "document"],
        ["patch.py"],
        ["cache/"],
        ["storage/"],
        ["selection/"],
        ["config.py", "ops/", "hf/"],
        ["registry.py", "head_profile.py", "checked_file.py", "tensor_parallel.py"],
    ]
    what = [
        "commands, measurements, drawings",
        "patch, unpatch, patched",
        "what transformers holds: MixKVCache, its layers, saving",
        "kept keys and values, chunks",
        "scores and methods: pure functions on tensors",
        "options; operations; everything that touches transformers",
        "leaves: names, head profiles, files, processes",
    ]
    for row, (names, text) in enumerate(zip(lines, what)):
        y, width = 0.15 + 0.64 * row, 4.9 / len(names)
        for column, name in enumerate(names):
            box(ax, 0.2 + width * column, y, width - 0.08, 0.4, name, KEPT if row == 2 else PLAIN, size=8)
        label(ax, 5.25, y + 0.2, text, size=8)
        if row + 1 < len(lines):
            arrow(ax, (2.6, y + 0.4), (2.6, y + 0.64))
    return figure


DRAWINGS = (storage, walk, global_budget, hybrid, rooms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write PNG files to this folder instead, to look at them")
    given = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "mixkv"
    for draw in DRAWINGS:
        path = given.png / f"{draw.__name__}.png" if given.png else FIGURES / f"{draw.__name__}.svg"
        figure = draw()
        figure.savefig(path, facecolor="white", dpi=110, **({} if given.png else {"metadata": {"Date": None}}))
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
