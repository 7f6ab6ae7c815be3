"""The part of an image that each image token of a prompt encodes: the grids and tilings of the vision families.

Sizes are (height, width) in pixels, of images as they are given to the processor. Coordinates are fractions of the image's height
and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Patch(NamedTuple):
    """The part of an image that one image token encodes, as fractions of its height and width.

    ``part``: "whole" for a view of the whole image at once, "tiles" for the finer view of an image cut into tiles.
    """

    part: str
    top: float
    left: float
    bottom: float
    right: float


_WHOLE = (0.0, 0.0, 1.0, 1.0)


def locate(
    config, sizes: Sequence[tuple[int, int]], image_tokens: int, grids: Sequence[tuple[int, int, int]] | None = None
) -> list[list[Patch | None]]:
    """The patches of the images of one prompt.

    Args:
        config: the model's.
        sizes: (height, width) of every image of the prompt, in order.
        image_tokens: number of image tokens in the prompt.
        grids: ``image_grid_thw`` of the images, where the processor returns it.

    Returns: for each image a list with one entry per image token, in order; None for separators and class tokens.

    Raises:
        ValueError: the family has no image tokens, or these images do not give that many.
    """
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"no patch grid is known for {config.model_type!r}; choose a model of {', '.join(sorted(_FAMILIES))}")
    found = family(config, list(sizes), image_tokens, grids)
    taken = sum(map(len, found))
    if taken != image_tokens:
        raise ValueError(
            f"{len(found)} images of sizes {list(sizes)} give {taken} image tokens in {config.model_type}, but the prompt has {image_tokens}: "
            f"pass all images of the prompt, in order, as the processor received them, and leave out options that crop them"
        )
    return found


def _cells(part: str, rows: int, cols: int, window=_WHOLE) -> list[Patch]:
    """``rows`` x ``cols`` patches over ``window`` (top, left, bottom, right), row by row, cut at the image's borders."""
    top, left, bottom, right = window

    def place(low: float, high: float, index: int, count: int) -> float:
        return min(max(low + (high - low) * index / count, 0.0), 1.0)

    return [
        Patch(
            part,
            place(top, bottom, row, rows),
            place(left, right, col, cols),
            place(top, bottom, row + 1, rows),
            place(left, right, col + 1, cols),
        )
        for row in range(rows)
        for col in range(cols)
    ]


def _side(vision) -> int:
    """Number of patches along one side of a square vision tower."""
    image, patch = (part if isinstance(part, int) else part[0] for part in (vision.image_size, vision.patch_size))
    return image // patch


def _class_token(config) -> list[None]:
    return [None] if config.vision_feature_select_strategy == "full" and "clip" in config.vision_config.model_type else []


def _qwen(config, sizes, image_tokens, grids):
    """One grid over the resized image; patches are merged into square cells."""
    if grids is None or len(grids) != len(sizes):
        raise ValueError(f"{config.model_type} needs the image_grid_thw of its {len(sizes)} images, and has {grids}")
    merge = config.vision_config.spatial_merge_size
    return [_cells("whole", height // merge, width // merge) for _, height, width in map(tuple, grids)]


def _llava(config, sizes, image_tokens, grids):
    """The shorter edge is resized to the tower's size and the longer one is cropped to its center."""
    side = _side(config.vision_config)

    def middle(length: int, other: int) -> tuple[float, float]:
        share = min(other / length, 1.0)
        return (1 - share) / 2, (1 + share) / 2

    def cells(height: int, width: int) -> list[Patch]:
        (top, bottom), (left, right) = middle(height, width), middle(width, height)
        return _cells("whole", side, side, (top, left, bottom, right))

    return [_class_token(config) + cells(*size) for size in sizes]


def _llava_next(config, sizes, image_tokens, grids):
    side = _side(config.vision_config)
    return [_class_token(config) + _cells("whole", side, side) + _unpadded(config, side, *size) for size in sizes]


def _llava_onevision(config, sizes, image_tokens, grids):
    """As llava_next, with a maximum number of patches. Several images in a prompt are padded to squares and not tiled."""
    side = _side(config.vision_config)
    if len(sizes) > 1:
        return [_cells("whole", side, side, _padded_square(*size)) + [None] for size in sizes]
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2
    return [_cells("whole", side, side) + _unpadded(config, side, *size, most=most) for size in sizes]


def _padded_square(height: int, width: int) -> tuple[float, float, float, float]:
    down, across = (max(height, width) / length for length in (height, width))
    return (1 - down) / 2, (1 - across) / 2, (1 + down) / 2, (1 + across) / 2


def _unpadded(config, side: int, height: int, width: int, *, most: int | None = None) -> list[Patch | None]:
    """The tiles of an image padded to the best of several resolutions, without the padding; every row ends in a separator.

    ``side``: patches on the side of a tile. ``most``: patches above which the grid is made coarser.
    """
    from transformers.image_processing_utils import select_best_resolution

    tile = config.vision_config.image_size
    resolution = select_best_resolution((height, width), config.image_grid_pinpoints)
    rows, cols = (side * (length // tile) for length in resolution)
    # The image in units of patches; along one axis it fills the canvas, along the other it lies in its middle.
    scale = min(rows / height, cols / width)
    true_rows, true_cols = height * scale, width * scale
    cut_rows, cut_cols = (
        (full - int(round(true, 7))) // 2 * (full > true) for full, true in ((rows, true_rows), (cols, true_cols))
    )
    seen_rows, seen_cols = rows - 2 * cut_rows, cols - 2 * cut_cols
    window = (
        0.5 - seen_rows / true_rows / 2,
        0.5 - seen_cols / true_cols / 2,
        0.5 + seen_rows / true_rows / 2,
        0.5 + seen_cols / true_cols / 2,
    )
    coarser = math.sqrt(seen_rows * seen_cols / most) if most else 0
    if coarser > 1.1:
        seen_rows, seen_cols = int(seen_rows // coarser), int(seen_cols // coarser)
    cells = _cells("tiles", seen_rows, seen_cols, window)
    return [patch for row in range(seen_rows) for patch in [*cells[row * seen_cols : (row + 1) * seen_cols], None]]


def _gemma3(config, sizes, image_tokens, grids):
    side = math.isqrt(config.mm_tokens_per_image)
    return [_cells("whole", side, side) for _ in sizes]


def _internvl(config, sizes, image_tokens, grids):
    """Tiles in the arrangement whose aspect ratio is closest to the image's, then the whole image."""
    if len(sizes) != 1:
        raise ValueError(
            f"the number of tiles of each of {len(sizes)} images is unknown for internvl: use one image per prompt"
        )
    side = math.isqrt(config.image_seq_length)
    count = image_tokens // side**2 - 1
    if count <= 0:
        return [_cells("whole", side, side)]
    height, width = sizes[0]
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    rows, cols = min(pairs, key=lambda pair: abs(width / height - pair[1] / pair[0]))
    return [_tiles(rows, cols, side) + _cells("whole", side, side)]


def _idefics3(config, sizes, image_tokens, grids):
    """The longer edge has the same number of tiles in every image; the whole image follows its tiles."""
    side = _side(config.vision_config) // config.scale_factor
    blocks = image_tokens // side**2

    def arrangement(longer: int, height: int, width: int) -> tuple[int, int]:
        shorter = max(1, math.ceil(round(longer * min(height, width) / max(height, width), 2)))
        return (shorter, longer) if width >= height else (longer, shorter)

    def total(longer: int) -> int:
        return sum(math.prod(arrangement(longer, *size)) + 1 for size in sizes)

    if blocks == len(sizes):
        return [_cells("whole", side, side) for _ in sizes]
    longer = next((longer for longer in range(1, blocks + 1) if total(longer) >= blocks), 1)
    return [_tiles(*arrangement(longer, *size), side) + _cells("whole", side, side) for size in sizes]


def _tiles(rows: int, cols: int, side: int) -> list[Patch]:
    """``rows`` x ``cols`` tiles of ``side`` x ``side`` patches, tile by tile."""
    windows = [patch[1:] for patch in _cells("tiles", rows, cols)]
    return [patch for window in windows for patch in _cells("tiles", side, side, window)]


_FAMILIES = {
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "smolvlm": _idefics3,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
}
