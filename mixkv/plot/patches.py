"""The patches of an image that a compressed cache keeps, drawn on the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..hf.image_tokens import picture_token_ids
from .grid import Patch, locate
from .share import share


def kept_patches(
    cache,
    image,
    inputs: Mapping,
    config,
    *,
    layer: int | None = None,
    head: int | None = None,
    row: int = 0,
    index: int = 0,
    part: str | None = None,
    ax=None,
):
    """Draws ``image`` with its evicted patches darkened: the fewer heads keep a patch, the darker it is.

    The parts of the image that the processor cropped off are drawn pale.

    Example:
        >>> model.generate(**inputs, past_key_values=cache)
        >>> mixkv.plot.kept_patches(cache, image, inputs, model.config)

    Args:
        cache: the `MixKVCache` that has read the prompt.
        image: the PIL image that the processor received; if the prompt has several, the list of all of them, in order.
        inputs: the processor's outputs: input_ids [B, N], and image_grid_thw [images, 3] of the qwen families.
        config: the model's config. The processor of llava is assumed to crop the center of the image, as in its checkpoints.
        layer, head: one layer, one KV head; None: summed over all.
        row: batch row of the cache.
        index: of the image to draw.
        part: "tiles" for the tiles of an image, "whole" for the view of the whole image that comes with them; None: the tiles
            where there are any.
        ax: matplotlib axes to draw on; None: new ones.

    Returns: the axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the model has no image tokens or its patch grid is unknown; or the images, part, layer or head do not match
            the prompt and the cache.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'mixkv[plot]'") from error

    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not 0 <= index < len(images):
        raise ValueError(f"index={index} must be from 0 to {len(images) - 1}: {len(images)} images were given")
    found = held(cache, [(one.height, one.width) for one in images], inputs, config, layer=layer, head=head, row=row)[index]
    parts = {patch.part for patch, _ in found}
    part = part or ("tiles" if "tiles" in parts else "whole")
    if part not in parts:
        raise ValueError(f"unknown part {part!r} of this image; choose from {', '.join(sorted(parts))}")
    found = [(patch, held_by) for patch, held_by in found if patch.part == part]

    picture = images[index]
    ax = pyplot.subplots()[1] if ax is None else ax
    ax.imshow(picture, extent=(0, picture.width, picture.height, 0))

    def rectangle(top: float, left: float, bottom: float, right: float) -> Rectangle:
        height, width = (bottom - top) * picture.height, (right - left) * picture.width
        return Rectangle((left * picture.width, top * picture.height), width, height)

    shades = [(0, 0, 0, 0.85 * (1 - held_by)) for _, held_by in found]
    margins = _margins([patch for patch, _ in found])
    boxes = [rectangle(*patch[1:]) for patch, _ in found] + [rectangle(*margin) for margin in margins]
    ax.add_collection(PatchCollection(boxes, facecolor=shades + [(1, 1, 1, 0.85)] * len(margins), linewidth=0))
    ax.set_axis_off()
    where = "all layers" if layer is None else f"layer {layer}"
    where += "" if head is None else f", head {head}"
    ax.set_title(f"{where}: {sum(held_by > 0 for _, held_by in found)} of {len(found)} patches held")
    return ax


def held(
    cache,
    sizes: Sequence[tuple[int, int]],
    inputs: Mapping,
    config,
    *,
    layer: int | None = None,
    head: int | None = None,
    row: int = 0,
) -> list[list[tuple[Patch, float]]]:
    """The data of `kept_patches`: for each image its patches, each with the share of heads that keep it, in [0, 1].

    Arguments are those of `kept_patches`, with ``sizes`` (height, width) instead of the images.
    """
    placeholders = picture_token_ids(config)
    if not placeholders:
        raise ValueError(f"{config.model_type} has no image tokens in its self-attention, so there is nothing to draw")
    ids = inputs["input_ids"]
    heads, batch = _heads(cache, layer, head, row)
    if batch % ids.shape[0]:
        raise ValueError(
            f"the batch size of this cache is {batch}, and inputs have {ids.shape[0]} prompts: pass the prompts that it has read"
        )
    prompt = row // (batch // ids.shape[0])  # beams and samples of a prompt lie next to each other
    is_image = torch.isin(ids.cpu(), torch.tensor(sorted(placeholders)))
    grids = _grids_of(inputs, config, is_image.sum(dim=1).tolist(), prompt)
    positions = is_image[prompt].nonzero().flatten().tolist()
    shares = iter(share(heads, ids.shape[1])[positions].tolist())
    return [
        [(patch, value) for patch, value in zip(patches, shares) if patch is not None]
        for patches in locate(config, sizes, len(positions), grids)
    ]


def _margins(patches: Sequence[Patch]) -> list[tuple[float, float, float, float]]:
    """Top, left, bottom, right of the strips of an image that no patch covers."""
    low, high = (min(patch.top for patch in patches), max(patch.bottom for patch in patches))
    left, right = (min(patch.left for patch in patches), max(patch.right for patch in patches))
    strips = [(0, 0, low, 1), (high, 0, 1, 1), (low, 0, high, left), (low, right, high, 1)]
    return [strip for strip in strips if strip[2] - strip[0] > 1e-9 and strip[3] - strip[1] > 1e-9]


def _heads(cache, layer: int | None, head: int | None, row: int) -> tuple[list[torch.Tensor], int]:
    """The positions that each of the chosen heads keeps of a batch row, and the batch size."""
    if layer is not None and not 0 <= layer < len(cache.layers):
        raise ValueError(f"layer={layer}: this cache has {len(cache.layers)} layers")
    layers = range(len(cache.layers)) if layer is None else [layer]
    kept = [found for found in map(cache.kept, layers) if found is not None]
    if not kept:
        raise ValueError(f"layer={layer} is not compressed: choose another layer")
    if not 0 <= row < len(kept[0]):
        raise ValueError(f"row={row}: the batch size of this cache is {len(kept[0])}")
    if head is not None and not 0 <= head < len(kept[0][row]):
        raise ValueError(f"head={head}: this model has {len(kept[0][row])} KV heads")
    heads = [positions for found in kept for positions in (found[row] if head is None else [found[row][head]])]
    return heads, len(kept[0])


def _grids_of(inputs: Mapping, config, image_tokens: list[int], prompt: int) -> list[tuple[int, ...]] | None:
    """The ``image_grid_thw`` of one prompt of a batch; ``image_tokens`` has the number of image tokens of each prompt."""
    grids = inputs.get("image_grid_thw")
    if grids is None:
        return None
    merge = config.vision_config.spatial_merge_size
    grids = [tuple(grid) for grid in grids.tolist()]
    starts, filled = [], 0
    for time, height, width in grids:
        starts.append(filled)
        filled += time * (height // merge) * (width // merge)
    first = sum(image_tokens[:prompt])
    return [grid for grid, start in zip(grids, starts) if first <= start < first + image_tokens[prompt]]
