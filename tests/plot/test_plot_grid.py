"""Patch grids of every family, checked against what the models themselves see and against the processors' arithmetic."""

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support import zoo, zoo_processors

from mixkv.plot.grid import locate

FAMILIES = [name for name in zoo_processors.RECIPES if name != "mllama"]
SIZES = [(24, 40), (48, 24), (24, 24)]


def grids(prompts):
    return prompts["image_grid_thw"].tolist() if "image_grid_thw" in prompts else None


def image_embeddings(model, prompts):
    """What the decoder is given in the image columns of the only row: [columns, D]."""
    seen = {}

    def look(module, args, kwargs):
        seen["embeds"] = kwargs["inputs_embeds"]

    handle = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**prompts)
    handle.remove()
    return seen["embeds"][0][prompts["input_ids"][0] == zoo.IMAGE]


def without_mixing(model):
    """The model with nothing coming out of its tower's attention, so that a patch shows in its own column only."""
    for name, weight in model.named_parameters():
        if "vis" in name and any(part in name for part in ("out_proj", "o_proj", "attn.proj", "projection_layer")):
            weight.data.zero_()
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_painting_a_patch_changes_its_column(name):
    processor, model = zoo_processors.build(name), without_mixing(zoo.build(name))
    for size in SIZES:
        pixels = np.array(zoo_processors.picture(*size, seed=1))
        prompts = zoo_processors.encode(processor, [[Image.fromarray(pixels)]])
        before = image_embeddings(model, prompts)
        patches = locate(model.config, [size], len(before), grids(prompts))[0]
        chosen = random.Random(0).sample([index for index, patch in enumerate(patches) if patch], 8)
        for index in chosen:
            part, *box = patches[index]
            top, left, bottom, right = (round(share * size[axis % 2]) for axis, share in enumerate(box))
            painted = pixels.copy()
            painted[top:bottom, left:right] = 255 - painted[top:bottom, left:right]
            after = image_embeddings(model, zoo_processors.encode(processor, [[Image.fromarray(painted)]]))
            change = (after - before).norm(dim=-1)
            change[[other for other, patch in enumerate(patches) if patch is None or patch.part != part]] = 0
            assert change.argmax() == index, f"{size}: {patches[index]}"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llava_onevision"])
def test_two_images_in_a_prompt(name):
    processor, model = zoo_processors.build(name), zoo.build(name)
    images = [zoo_processors.picture(*size) for size in SIZES[:2]]
    prompts = zoo_processors.encode(processor, [images])
    columns = int(prompts["input_ids"].eq(zoo.IMAGE).sum())
    if name == "internvl":
        with pytest.raises(ValueError, match="is unknown for internvl: use one image per prompt"):
            locate(model.config, SIZES[:2], columns)
        return
    found = locate(model.config, SIZES[:2], columns, grids(prompts))
    alone = [zoo_processors.encode(processor, [[image]]) for image in images]
    assert found == [
        locate(model.config, [size], int(own["input_ids"].eq(zoo.IMAGE).sum()), grids(own))[0]
        for size, own in zip(SIZES, alone)
    ]


def test_several_images_of_llava_onevision_are_padded_to_squares():
    processor, model = zoo_processors.build("llava_onevision"), without_mixing(zoo.build("llava_onevision"))
    tall, wide = zoo_processors.picture(32, 24), zoo_processors.picture(32, 64)
    before = image_embeddings(model, zoo_processors.encode(processor, [[tall, wide]]))
    first, second = locate(model.config, [(32, 24), (32, 64)], len(before))
    assert len(first) == len(second) == 5 and first[4] is second[4] is None
    assert first[0][1:] == pytest.approx((0, 0, 0.5, 0.5))
    pixels = np.array(wide)
    pixels[16:, 32:] = 255 - pixels[16:, 32:]
    after = image_embeddings(model, zoo_processors.encode(processor, [[tall, Image.fromarray(pixels)]]))
    assert (after - before).norm(dim=-1).argmax() == 5 + 3
    assert second[3][1:] == pytest.approx((0.5, 0.5, 1, 1))
    finer = SimpleNamespace(model_type="llava_onevision", vision_config=vision(16, 4, "siglip_vision_model"))
    patches = locate(finer, [(10, 20), (20, 20)], 2 * 17)[0]
    rows = [(patch.top, patch.bottom) for patch in patches[:16:4]]
    assert rows == [(0, 0), (0, 0.5), (0.5, 1), (1, 1)], "above and below is padding"


def vision(image_size, patch_size, kind):
    return SimpleNamespace(image_size=image_size, patch_size=patch_size, model_type=kind)


NEXT = SimpleNamespace(
    model_type="llava_next",
    vision_config=vision(336, 14, "clip_vision_model"),
    vision_feature_select_strategy="default",
    image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
)
ONEVISION = SimpleNamespace(
    model_type="llava_onevision",
    vision_config=vision(384, 14, "siglip_vision_model"),
    vision_aspect_ratio="anyres_max_9",
    image_grid_pinpoints=[[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)],
)
IDEFICS3 = SimpleNamespace(model_type="idefics3", vision_config=vision(364, 14, "idefics3_vision"), scale_factor=2)
INTERNVL = SimpleNamespace(model_type="internvl", image_seq_length=256)


def photographs(count=60):
    chance = random.Random(0)
    return [(chance.randint(60, 2000), chance.randint(60, 2000)) for _ in range(count)]


@pytest.mark.parametrize("config", [NEXT, ONEVISION], ids=["llava_next", "llava_onevision"])
def test_counts_at_the_checkpoints_sizes(config):
    """Against the processor's own arithmetic, which is written apart from the model's."""
    side = config.vision_config.image_size // 14
    if config is NEXT:
        processor = bare(transformers.LlavaNextProcessor, patch_size=14, num_additional_image_tokens=0)
    else:
        processor = bare(transformers.LlavaOnevisionProcessor, num_image_tokens=side**2, vision_aspect_ratio="anyres_max_9")
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints)
    for height, width in photographs():
        size = config.vision_config.image_size
        columns = processor._get_number_of_features(height, width, size, size)
        (patches,) = locate(config, [(height, width)], columns)
        check_cover(patches)


def bare(kind, **attributes):
    """A processor for its arithmetic only."""
    processor = kind.__new__(kind)
    for name, value in attributes.items():
        setattr(processor, name, value)
    return processor


def check_cover(patches):
    """The tiles are rows from top to bottom and left to right over nearly all of the image."""
    tiles = [patch for patch in patches if patch and patch.part == "tiles"]
    assert tiles == sorted(tiles, key=lambda patch: (patch.top, patch.left))
    area = sum((patch.bottom - patch.top) * (patch.right - patch.left) for patch in tiles)
    assert 0.9 < area < 1.0001


def test_idefics3_arrangements_at_the_checkpoints_sizes():
    options = dict(size=dict(longest_edge=4 * 364), max_image_size=dict(longest_edge=364))
    processor = zoo_processors.build("idefics3", **options).image_processor
    for height, width in photographs():
        count, rows, cols = processor.get_number_of_image_patches(height, width, {})
        (patches,) = locate(IDEFICS3, [(height, width)], count * 13**2)
        tiles = [patch for patch in patches if patch.part == "tiles"]
        assert len({patch.top for patch in tiles}) == 13 * rows and len({patch.left for patch in tiles}) == 13 * cols


def test_internvl_arrangements_at_the_checkpoints_sizes():
    processor = zoo_processors.build("internvl").image_processor
    module = sys.modules[type(processor).__module__]
    for height, width in photographs():
        cols, rows = module.get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
        blocks = rows * cols + (rows * cols > 1)
        (patches,) = locate(INTERNVL, [(height, width)], blocks * 256)
        tiles = [patch for patch in patches if patch.part == "tiles"]
        expected = (16 * rows, 16 * cols) if blocks > 1 else (0, 0)
        assert (len({patch.top for patch in tiles}), len({patch.left for patch in tiles})) == expected


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no patch grid is known for 'llama'; choose a model of gemma3, "):
        locate(SimpleNamespace(model_type="llama"), [(24, 24)], 9)
    with pytest.raises(ValueError, match="1 images of sizes .* give 9 image tokens in llava, but the prompt has 12"):
        locate(zoo.build("llava").config, [(24, 24)], 12)
    with pytest.raises(ValueError, match="needs the image_grid_thw of its 2 images"):
        locate(zoo.build("qwen2_vl").config, [(24, 24)] * 2, 18, [(1, 6, 6)])
