"""The patches of an image that a compressed cache keeps, drawn on the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..hf.image_tokens import picture_token_ids
from .canvas import axes, import_pyplot
from .grid import Patch, locate
from .share import colour_bar, kept_by_head, scale, share, strength

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar

# The veil over a patch is grey, so that it shows on white paper and on dark photographs alike.
_GREY = (0.72, 0.74, 0.77)
# Its opacity where no head keeps the patch, and the highest one where some head does: that much can be read through.
_EVICTED, _FADED = 0.85, 0.5


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
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws ``image`` with its evicted patches faded to grey: the fewer KV heads keep a patch, the more it fades.

    What the processor cut off, the model has never seen: it is white and hatched.

    Example:
        >>> model.generate(**inputs, cache=cache)
        >>> mixkv.plot.kept_patches(cache, image, inputs, model.config)

    Args:
        cache: the `MixKVCache` that has read the prompt.
        image: the PIL image that went to the processor; a list of all of the prompt's images, in order, if there are several.
        inputs: the processor's outputs: input_ids [B, N], and image_grid_thw [images, 3] of the qwen families.
        config: the model's config. For llava the processor is taken to crop the middle of the image, as its checkpoints do.
        layer, head: only this layer, only this KV head of every layer; all by default.
        row: the batch row.
        index: which of several images.
        part: "tiles" for the tiles of an image, "whole" for the view of the whole image that comes with them; None: the tiles
            where there are any.
        legend: whether to draw a colour bar; see `patch_legend` for one that several pictures share.
        ax: where to draw; a new figure by default.

    Returns: the Axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a model without image tokens or without a known grid, or images, part, layer or head that do not fit.
    """
    import_pyplot()
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not 0 <= index < len(images):
        raise ValueError(f"index={index} is none of the {len(images)} images given")
    sizes = [(one.height, one.width) for one in images]
    found = patch_shares(cache, sizes, inputs, config, layer=layer, head=head, row=row)[index]
    parts = {patch.part for patch, _ in found}
    part = part or ("tiles" if "tiles" in parts else "whole")
    if part not in parts:
        raise ValueError(f"part={part!r} is none of what this image has: {', '.join(sorted(parts))}")
    found = [(patch, share) for patch, share in found if patch.part == part]

    picture = images[index]
    inch = max(picture.size) / 5.4
    ax = axes(ax, max(picture.width / inch, 4.5) + 0.2, picture.height / inch + 1.5, layout="compressed")
    ax.imshow(picture, extent=(0, picture.width, picture.height, 0))

    def rectangle(top: float, left: float, bottom: float, right: float) -> Rectangle:
        height, width = (bottom - top) * picture.height, (right - left) * picture.width
        return Rectangle((left * picture.width, top * picture.height), width, height)

    veils = [(*_GREY, veil(share)) for _, share in found]
    ax.add_collection(PatchCollection([rectangle(*patch[1:]) for patch, _ in found], facecolor=veils, linewidth=0))
    margins = [rectangle(*margin) for margin in _margins([patch for patch, _ in found])]
    if margins:
        ax.add_collection(PatchCollection(margins, facecolor=(1, 1, 1, 0.9), edgecolor=(*_GREY, 1), linewidth=0, hatch="///"))
    ax.set_axis_off()
    where = "all layers" if layer is None else f"layer {layer}"
    where += "" if head is None else f", KV head {head}"
    title = f"{where}\n{sum(share > 0 for _, share in found)} of {len(found)} patches kept"
    ax.set_title(title + ("\n(hatched: cut off by the processor)" if margins else ""), fontsize=10)
    if legend:
        patch_legend([ax])
    return ax


def patch_legend(panels: Sequence[Axes]) -> Colorbar:
    """The colour bar of one or several pictures that `kept_patches` drew on one figure: the shade of white paper by the share."""
    (left, right), (bottom, top) = panels[0].get_xlim(), panels[0].get_ylim()
    tall = len(panels) == 1 and abs(bottom - top) > 1.5 * abs(right - left)
    evicted, faded = (tuple(1 - opacity * (1 - part) for part in _GREY) for opacity in (_EVICTED, _FADED))
    return colour_bar(
        panels[0].figure,
        scale([faded, (1, 1, 1)], evicted),
        "share of KV heads that keep the patch",
        ax=list(panels),
        **({"location": "right", "shrink": 0.6} if tall else {"location": "bottom", "shrink": 0.8 / len(panels)}),
        aspect=25,
    )


def veil(share: float) -> float:
    """The opacity of the veil over a patch that this share of the KV heads keeps."""
    return _FADED * (1 - strength(share)) if share else _EVICTED


def patch_shares(
    cache,
    sizes: Sequence[tuple[int, int]],
    inputs: Mapping,
    config,
    *,
    layer: int | None = None,
    head: int | None = None,
    row: int = 0,
) -> list[list[tuple[Patch, float]]]:
    """What `kept_patches` draws: for each image its patches, and the share of KV heads that keep each, from 0 to 1.

    Args: as there, with ``sizes`` (height, width) of the prompt's images.
    """
    placeholders = picture_token_ids(config)
    if not placeholders:
        raise ValueError(f"{config.model_type} has no image tokens in its self-attention: there is nothing to draw")
    ids = inputs["input_ids"]
    rows = kept_by_head(cache, layer, head, row)
    if len(rows) % ids.shape[0]:
        raise ValueError(
            f"the cache holds a batch of {len(rows)}, and inputs are {ids.shape[0]} prompts: give those it has read"
        )
    prompt = row // (len(rows) // ids.shape[0])  # beams and samples of a prompt lie next to each other
    is_image = torch.isin(ids.cpu(), torch.tensor(sorted(placeholders)))
    grids = _grids_of(inputs, config, is_image.sum(dim=1).tolist(), prompt)
    positions = is_image[prompt].nonzero().flatten().tolist()
    shares = iter(share(rows[row], ids.shape[1])[positions].tolist())
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


def _grids_of(inputs: Mapping, config, tokens: list[int], prompt: int) -> list[tuple[int, int, int]] | None:
    """The ``image_grid_thw`` of one prompt, out of those of a batch whose prompts have ``tokens`` image tokens each."""
    grids = inputs.get("image_grid_thw")
    if grids is None:
        return None
    merge = config.vision_config.spatial_merge_size
    grids = [(time, height, width) for time, height, width in grids.tolist()]
    starts, filled = [], 0
    for time, height, width in grids:
        starts.append(filled)
        filled += time * (height // merge) * (width // merge)
    first = sum(tokens[:prompt])
    return [grid for grid, start in zip(grids, starts) if first <= start < first + tokens[prompt]]
