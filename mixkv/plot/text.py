"""The prompt's text, each token colored by the share of KV heads that keep it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from .canvas import axes
from .share import share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerBase

_NEWLINE, _TAB = "↵", "    "
# Width of a character and distance between lines of a monospaced font, relative to the font size.
_CHARACTER, _LINE = 0.602, 1.45
_POINTS = 72  # an inch
_SHADES = ("#ffffff", "#4a98c9")  # both light enough for black text


class Piece(NamedTuple):
    """The part of a token's text that is on one line.

    Attributes:
        position: of the token in the sequence.
        line, start: the line, and the first character on it.
    """

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
    """Draws the text of ``input_ids``, each token on a color for the share of KV heads that keep it.

    Args:
        cache: a `MixKVCache` that has read ``input_ids``, and perhaps more.
        tokenizer: of the model.
        input_ids: [N] or [B, N], the sequence as passed to the model; padding on the left is not drawn.
        layer, head: only this layer, only this KV head of each layer; all by default.
        row: the batch row.
        width: characters per line.
        ax: where to draw; a new figure that fits the text by default.

    Returns: the Axes.

    Raises:
        ValueError: the cache is empty, has read fewer tokens, or has no such row, layer or head.
        ImportError: matplotlib is not installed.
    """
    ids = input_ids if input_ids.ndim == 1 else input_ids[row]
    found = shares(cache, len(ids), layer=layer, head=head, row=row)
    padding = int(((ids.cpu() != tokenizer.pad_token_id) | (found > 0)).long().argmax())
    texts = [tokenizer.decode([token]) for token in ids[padding:].tolist()]
    page = lay_out(texts, width)
    lines = page[-1].line + 1 if page else 1
    size = 8.0
    ax = axes(ax, width * size * _CHARACTER / _POINTS / 0.72, 0.4 + lines * size * _LINE / _POINTS / 0.77)
    return _draw(ax, page, found[padding:].tolist(), width, lines)


def shares(cache, length: int, *, layer: int | None = None, head: int | None = None, row: int = 0) -> torch.Tensor:
    """The share of KV heads that keep each of the first ``length`` positions: float32 [length], in [0, 1].

    Arguments and errors are those of `kept`.
    """
    held = [cache.kept(index) for index in range(len(cache.layers))]
    ours = [index for index, part in enumerate(held) if part]
    if not ours:
        raise ValueError("this cache is empty: run a model on a prompt with it first")
    if layer is not None and layer not in ours:
        raise ValueError(f"layer={layer} is not compressed; choose from {ours}")
    if length > cache.get_seq_length():
        raise ValueError(
            f"input_ids has {length} tokens and this cache has read {cache.get_seq_length()}: pass the tokens that it has read"
        )
    batch, most = len(held[ours[0]]), max(len(held[index][0]) for index in ours)
    if not 0 <= row < batch:
        raise ValueError(f"row={row} must be from 0 to {batch - 1}: the batch size of this cache is {batch}")
    if head is not None and not 0 <= head < most:
        raise ValueError(f"head={head} must be from 0 to {most - 1}: the model has {most} KV heads")
    rows = [held[index][row] for index in ours if layer in (None, index)]
    chosen = [part for heads in rows for part in (heads if head is None else heads[head : head + 1])]
    return share(chosen, length)


def lay_out(texts: list[str], width: int) -> list[Piece]:
    """Arranges tokens on lines of ``width`` characters. A token that does not fit and one after a line break start a new line."""
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


def _draw(ax: Axes, page: list[Piece], held_by: list[float], width: int, lines: int) -> Axes:
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    shades = ScalarMappable(Normalize(0, 1), LinearSegmentedColormap.from_list("kept", _SHADES))
    ax.figure.colorbar(shades, ax=ax, label="share of KV heads that keep the token", fraction=0.04, pad=0.02)
    ax.set(xlim=(0, width), ylim=(lines, 0))
    ax.set_axis_off()
    boxes = [Rectangle((piece.start, piece.line), len(piece.text), 1) for piece in page]
    colours = shades.to_rgba([held_by[piece.position] for piece in page])
    ax.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors="none", antialiased=False))
    size = ax.get_position().width * ax.figure.get_figwidth() * _POINTS / width / _CHARACTER
    for piece in page:
        ax.text(
            piece.start,
            piece.line + 0.5,
            piece.text,
            family="monospace",
            fontsize=size,
            va="center_baseline",
            parse_math=False,
        )
    return ax
