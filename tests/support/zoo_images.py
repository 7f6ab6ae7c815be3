"""One random image per prompt row, in the tensors each vision family's `generate()` expects.

No processor is involved: a `Picture` knows how many placeholder columns its image takes in the prompt, the vision
tower that goes with it, and how to draw the tensors of one row. Everything but the columns named in `aligned` has
one entry per image (or per patch) in its first dimension, so rows join by concatenation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

PATCH = 4  # pixels on the side of a patch, in every tower
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


@dataclass(frozen=True)
class Picture:
    """How one image enters a prompt.

    tokens: placeholder columns.
    draw: (is_image [L] bool, generator, kind) -> the tensors of one row; `kind` 0 or 1 picks one of two image shapes
        where the family has shapes that take equally many columns.
    tower: vision_config of the model.
    aligned: names among the drawn tensors that have one entry per prompt column, in dimension 1.
    """

    tokens: int
    draw: Callable[[torch.Tensor, torch.Generator, int], dict]
    tower: dict
    aligned: tuple[str, ...] = ()


def _square(side):
    """[1, 3, side, side] pixels (llava, internvl)."""

    def draw(is_image, generator, kind):
        return dict(pixel_values=torch.randn(1, 3, side, side, generator=generator))

    return draw


def _typed_square(side):
    """A square image whose columns are marked for bidirectional attention (gemma3)."""

    def draw(is_image, generator, kind):
        pixels = torch.randn(1, 3, side, side, generator=generator)
        return dict(pixel_values=pixels, token_type_ids=is_image.long()[None])

    return draw


def _masked_square(side):
    """[1, 1 image, 3, side, side] pixels with a pixel mask (idefics3, smolvlm)."""

    def draw(is_image, generator, kind):
        pixels = torch.randn(1, 1, 3, side, side, generator=generator)
        return dict(pixel_values=pixels, pixel_attention_mask=torch.ones(1, 1, side, side, dtype=torch.bool))

    return draw


def _anyres(side):
    """A wide image of two tiles after its thumbnail: [1, 3 tiles, 3, side, side] (llava_next, llava_onevision)."""

    def draw(is_image, generator, kind):
        pixels = torch.randn(1, 3, 3, side, side, generator=generator)
        return dict(pixel_values=pixels, image_sizes=torch.tensor([[side, 2 * side]]))

    return draw


def _grid(is_image, generator, kind):
    """24 flattened patches, 4 x 6 or 2 x 12: the next text position differs between the two (qwen*_vl)."""
    grid = [(1, 4, 6), (1, 2, 12)][kind]
    return dict(
        pixel_values=torch.randn(24, 3 * 2 * PATCH * PATCH, generator=generator),
        image_grid_thw=torch.tensor([grid]),
        mm_token_type_ids=is_image.int()[None],
    )


def _tiles(side):
    """One or two tiles, seen by cross-attention from the image token on (mllama)."""

    def draw(is_image, generator, kind):
        used = torch.tensor([1, kind])
        pixels = torch.randn(1, 1, 2, 3, side, side, generator=generator) * used.view(2, 1, 1, 1)
        seen = is_image.long().cummax(0).values
        return dict(
            pixel_values=pixels,
            aspect_ratio_ids=torch.tensor([[1 + kind]]),
            aspect_ratio_mask=used.view(1, 1, 2),
            cross_attention_mask=(seen[:, None] * used).view(1, -1, 1, 2),
        )

    return draw


_PATCHES = dict(depth=2, num_heads=2, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2)
_SIGLIP = dict(TOWER, model_type="siglip_vision_model", patch_size=PATCH)
_CLIP = dict(TOWER, model_type="clip_vision_model", patch_size=PATCH, projection_dim=32)


def qwen2_vl(hidden):
    """4 x 6 or 2 x 12 patches, merged two by two: 6 columns."""
    return Picture(6, _grid, dict(_PATCHES, embed_dim=32, hidden_size=hidden, mlp_ratio=2), ("mm_token_type_ids",))


def qwen2_5_vl(hidden):
    """As `qwen2_vl`, with a windowed and a full block in the tower.

    One token per second: transformers 5.4 multiplies the temporal position of still images by this number.
    """
    tower = dict(_PATCHES, hidden_size=32, intermediate_size=64, out_hidden_size=hidden, tokens_per_second=1)
    return Picture(6, _grid, dict(tower, window_size=4 * PATCH, fullatt_block_indexes=[1]), ("mm_token_type_ids",))


def qwen3_vl(hidden):
    """As `qwen2_vl`, with one deepstack feature level."""
    tower = dict(_PATCHES, hidden_size=32, intermediate_size=64, out_hidden_size=hidden)
    return Picture(6, _grid, dict(tower, num_position_embeddings=36, deepstack_visual_indexes=[0]), ("mm_token_type_ids",))


GEMMA3 = Picture(9, _typed_square(24), dict(_SIGLIP, image_size=24), ("token_type_ids",))
LLAVA = Picture(9, _square(12), dict(_CLIP, image_size=12))
# thumbnail 2 x 2, then 2 rows of 4 patches with a newline each
LLAVA_NEXT = Picture(14, _anyres(8), dict(_CLIP, image_size=8))
LLAVA_ONEVISION = Picture(14, _anyres(8), dict(_SIGLIP, image_size=8))
# 6 x 6 patches, shuffled two by two
INTERNVL = Picture(9, _square(24), dict(TOWER, image_size=[24, 24], patch_size=[PATCH, PATCH]))
IDEFICS3 = Picture(9, _masked_square(24), dict(TOWER, image_size=24, patch_size=PATCH))
MLLAMA = Picture(
    1,
    _tiles(12),
    dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        image_size=12,
        patch_size=PATCH,
        max_num_tiles=2,
        supported_aspect_ratios=[[1, 1], [1, 2]],
        intermediate_layers_indices=[0, 1],
        vision_output_dim=96,
    ),
    ("cross_attention_mask",),
)
