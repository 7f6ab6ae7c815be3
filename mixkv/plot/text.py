"""The text that a compressed cache keeps: the prompt's tokens, coloured by the share of KV heads that keep them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from .canvas import import_pyplot
from .share import colour_bar, kept_by_head, scale, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerBase

_NEWLINE, _TAB = "↵", "    "
# Of a monospaced font: its characters' width and the distance of lines, both to the font size.
_CHARACTER, _LINE = 0.602, 1.45
_POINTS = 72  # an inch
_SHADES = ("#ffffff", "#4a98c9")  # both light enough for black text
EVICTED_TEXT = "#a0a0a0"


class Piece(NamedTuple):
    """A token's text on one line: its ``position`` in the sequence, the ``line`` and the first character ``start`` on the page."""

    position: int
    line: int
    start: int
    text: str


def kept(
    cache,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    *,
    layer: int | None = None,
    head: int | None = None,
    row: int = 0,
    width: int = 80,
    ax: Axes | None = None,
) -> Axes:
    """Draws the text of ``input_ids``, every token on a colour that shows the share of KV heads that keep it.

    A token that no head keeps is grey on white.

    Args:
        cache: a `MixKVCache` that has read ``input_ids``, and perhaps more.
        tokenizer: of the model.
        input_ids: [N] or [B, N], the sequence as passed to the model; padding on the left is not drawn.
        layer, head: only this layer, only this KV head of every layer; all by default.
        row: the batch row.
        width: characters a line.
        ax: where to draw; a new figure as high as the text by default.

    Returns: the Axes.

    Raises:
        ValueError: the cache is empty, has read fewer tokens, or has no such row, layer or head.
        ImportError: matplotlib is not installed.
    """
    pyplot = import_pyplot()
    ids = input_ids if input_ids.ndim == 1 else input_ids[row]
    found = shares(cache, len(ids), layer=layer, head=head, row=row)
    padding = int(((ids.cpu() != tokenizer.pad_token_id) | (found > 0)).long().argmax())
    texts = [tokenizer.decode([token]) for token in ids[padding:].tolist()]
    page = lay_out(texts, width)
    lines = page[-1].line + 1 if page else 1
    if ax is None:
        ax, size = _new_page(pyplot, width, lines)
    else:
        _legend(ax.figure, ax=ax, location="top", aspect=50, pad=0.02)
        ax.figure.draw_without_rendering()  # for the width of the Axes in a figure that is laid out when it is drawn
        size = ax.get_position().width * ax.figure.get_figwidth() * _POINTS / width / _CHARACTER
    return _draw(ax, page, found[padding:].tolist(), width, lines, size)


def shares(cache, tokens: int, *, layer: int | None = None, head: int | None = None, row: int = 0) -> torch.Tensor:
    """The share of KV heads that keep each of the first ``tokens`` tokens: float32 [tokens], from 0 to 1.

    Args and errors as for `kept`.
    """
    heads = kept_by_head(cache, layer, head, row)[row]
    if tokens > cache.get_seq_length():
        raise ValueError(
            f"input_ids has {tokens} tokens and this cache has read {cache.get_seq_length()}: give the tokens that it has read"
        )
    return share(heads, tokens)


def lay_out(texts: list[str], width: int) -> list[Piece]:
    """Places tokens on lines of ``width`` characters: whole where they fit, and after a line break on a new line."""
    page, line, start = [], 0, 0
    for position, text in enumerate(texts):
        parts = text.replace("\t", _TAB).replace("\n", _NEWLINE + "\n").split("\n")
        for index, part in enumerate(parts):
            if index or start and start + len(part) > width:
                line, start = line + 1, 0
            for first in range(0, len(part), width):
                if first:
                    line, start = line + 1, 0
                page.append(Piece(position, line, start, part[first : first + width]))
                start += len(page[-1].text)
    return page


def _new_page(pyplot, width: int, lines: int) -> tuple[Axes, float]:
    """The Axes of a new figure that the text fills, below a colour bar, and the size of its font in points."""
    size, margin, bar = 8.0, 0.15, 0.75  # the margin and the height of the colour bar with its labels in inches
    across, down = width * size * _CHARACTER / _POINTS, lines * size * _LINE / _POINTS
    wide, high = across + 2 * margin, down + bar + margin
    figure = pyplot.figure(figsize=(wide, high))
    ax = figure.add_axes((margin / wide, margin / high, across / wide, down / high))
    above = figure.add_axes(((margin + across / 4) / wide, 1 - (bar - 0.3) / high, across / 2 / wide, 0.12 / high))
    _legend(figure, cax=above, orientation="horizontal", ticklocation="bottom")
    above.tick_params(labelsize=size)
    above.xaxis.set_label_position("top")
    return ax, size


def _legend(figure, **options) -> None:
    bar = colour_bar(figure, scale(_SHADES), "share of KV heads that keep the token", **options)
    bar.ax.get_xticklabels()[0].set_color(EVICTED_TEXT)


def _draw(ax: Axes, page: list[Piece], kept_by: list[float], width: int, lines: int, size: float) -> Axes:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    ax.set(xlim=(0, width), ylim=(lines, 0))
    ax.set_axis_off()
    boxes = [Rectangle((piece.start, piece.line), len(piece.text), 1) for piece in page]
    colours = scale(_SHADES).to_rgba([kept_by[piece.position] for piece in page])
    ax.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors="none", antialiased=False))
    for piece in page:
        text = ax.text(
            piece.start,
            piece.line + 0.5,
            piece.text,
            family="monospace",
            fontsize=size,
            color="black" if kept_by[piece.position] else EVICTED_TEXT,
            va="center_baseline",
            parse_math=False,
        )
        text.set_in_layout(False)
    return ax
