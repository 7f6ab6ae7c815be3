"""`mixkv.plot.kept_patches`: the right patches, checked against what the models themselves see."""

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import zoo
import zoo_processors
from PIL import Image

import mixkv
from mixkv.plot.grid import Patch, locate
from mixkv.plot.patches import held, kept_patches

FAMILIES = [name for name in zoo_processors.RECIPES if name != "mllama"]
SIZES = [(24, 40), (48, 24), (24, 24)]
SMALL = dict(budget=14, window=6, kernel_size=3)


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


@pytest.mark.parametrize("name", FAMILIES)
def test_two_images_in_a_prompt(name):
    if name == "llava_onevision":
        pytest.skip("images are not tiled where a prompt has several: see the next test")
    processor, model = zoo_processors.build(name), zoo.build(name)
    images = [zoo_processors.picture(*size) for size in SIZES[:2]]
    prompts = zoo_processors.encode(processor, [images])
    columns = int(prompts["input_ids"].eq(zoo.IMAGE).sum())
    if name == "internvl":
        with pytest.raises(ValueError, match="cannot be told for internvl: one image a prompt is needed"):
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
    with pytest.raises(ValueError, match="no patch grid is known for 'llama': known are gemma3, "):
        locate(SimpleNamespace(model_type="llama"), [(24, 24)], 9)
    with pytest.raises(ValueError, match="1 images of sizes .* take 9 columns in llava, but the prompt has 12"):
        locate(zoo.build("llava").config, [(24, 24)], 12)
    with pytest.raises(ValueError, match="needs the image_grid_thw of its 2 images"):
        locate(zoo.build("qwen2_vl").config, [(24, 24)] * 2, 18, [(1, 6, 6)])


class Kept:
    """A cache of two layers of two heads that holds given columns in row 1; layer 0 is not compressed."""

    def __init__(self, *heads):
        self.layers, self.heads = [None] * 2, [torch.tensor(head, dtype=torch.int32) for head in heads]

    def kept(self, layer):
        return None if layer == 0 else [[torch.arange(3), torch.arange(3)], self.heads]


def llava_prompt():
    ids = torch.full((2, 20), zoo.TEXT.start)
    ids[0, 2:11] = ids[1, 5:14] = zoo.IMAGE
    return dict(input_ids=ids)


def test_held_patches_are_those_of_the_kept_columns():
    """Columns 5 to 13 are the 3 x 3 patches; 30 is a generated token."""
    cache, config = Kept([1, 5, 9, 30], [9, 13, 14]), zoo.build("llava").config
    (found,) = held(cache, [(24, 24)], llava_prompt(), config, row=1)
    assert [share for _, share in found] == [0.5, 0, 0, 0, 1, 0, 0, 0, 0.5]
    assert found[4][0][1:] == pytest.approx((1 / 3, 1 / 3, 2 / 3, 2 / 3))
    (found,) = held(cache, [(24, 24)], llava_prompt(), config, row=1, head=1)
    assert [share for _, share in found] == [0, 0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layer=2), "layer=2: this cache has 2 layers"),
        (dict(layer=0), "layer=0 is not compressed"),
        (dict(row=2), "row=2: this cache holds a batch of 2"),
        (dict(head=2), "head=2: this model has 2 KV heads"),
    ],
)
def test_places_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        held(Kept([1], [2]), [(24, 24)], llava_prompt(), zoo.build("llava").config, **options)


def test_mllama_has_nothing_to_draw():
    with pytest.raises(ValueError, match="mllama has no image columns in its self-attention"):
        held(Kept([1], [2]), [(24, 24)], llava_prompt(), zoo.build("mllama").config)


@pytest.mark.parametrize("name", FAMILIES)
def test_shares_add_up_to_the_rows_that_stats_counts(name):
    """In a padded batch with images of different size, for the row with one image."""
    processor, model = zoo_processors.build(name), zoo.build(name)
    images = [[zoo_processors.picture(*SIZES[0])], [zoo_processors.picture(*SIZES[2])]]
    prompts = zoo_processors.encode(processor, images, lengths=[24, 17])
    cache = mixkv.MixKVCache(model, **SMALL)
    model.generate(**prompts, past_key_values=cache, max_new_tokens=2)
    stats = cache.stats()
    for row, size in enumerate((SIZES[0], SIZES[2])):
        (found,) = held(cache, [size], prompts, model.config, row=row)
        separators = separators_held(cache, model.config, size, prompts, row)
        ours = [rows[row] for rows in stats["image_rows"] if rows is not None]
        heads = sum(len(rows) for rows in ours)
        assert sum(share for _, share in found) * heads + separators == pytest.approx(float(sum(map(torch.sum, ours))))


def separators_held(cache, config, size, prompts, row):
    columns = (prompts["input_ids"][row] == zoo.IMAGE).nonzero().flatten()
    own = prompts["image_grid_thw"][row : row + 1].tolist() if "image_grid_thw" in prompts else None
    (patches,) = locate(config, [size], len(columns), own)
    blank = {int(column) for column, patch in zip(columns, patches) if patch is None}
    kept = [cache.kept(layer) for layer in range(len(cache.layers))]
    return sum(int(column) in blank for found in kept if found is not None for head in found[row] for column in head)


def test_beams_lie_next_to_each_other():
    config = zoo.build("llava").config
    one = dict(input_ids=llava_prompt()["input_ids"][1:])
    (found,) = held(Kept([5], [5]), [(24, 24)], one, config, row=1)
    assert [share for _, share in found] == [1] + 8 * [0]
    three = dict(input_ids=torch.cat([one["input_ids"]] * 3))
    with pytest.raises(ValueError, match="the cache holds a batch of 2, and inputs are 3 prompts"):
        held(Kept([5], [5]), [(24, 24)], three, config)


def test_drawing():
    matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib")
    matplotlib.use("Agg")
    picture, config = zoo_processors.picture(30, 60), zoo.build("llava").config
    axes = kept_patches(Kept([5, 9], [9]), picture, llava_prompt(), config, row=1, layer=1)
    assert axes.get_title() == "layer 1: 2 of 9 patches held"
    (drawn,) = axes.collections
    alpha = drawn.get_facecolor()[:, 3]
    assert alpha == pytest.approx([0.425] + 3 * [0.85] + [0] + 4 * [0.85] + 2 * [0.85])
    assert drawn.get_facecolor()[:, 0].tolist() == 9 * [0] + 2 * [1], "the cut off sides are pale"
    corners = [path.vertices[:4].tolist() for path in drawn.get_paths()]
    assert corners[9][2] == pytest.approx([15, 30]) and corners[10][0] == pytest.approx([45, 0])
    assert corners[0][0] == pytest.approx([15, 0]) and corners[4][2] == pytest.approx([35, 20])
    assert axes.images[0].get_extent() == [0, 60, 30, 0]
    axes.figure.canvas.draw()
    other = matplotlib.pyplot.subplots()[1]
    assert kept_patches(Kept([5], [9]), [picture], llava_prompt(), config, row=1, ax=other) is other
    with pytest.raises(ValueError, match="part='tiles' is none of what this image has: whole"):
        kept_patches(Kept([5], [9]), picture, llava_prompt(), config, row=1, part="tiles")
    with pytest.raises(ValueError, match="index=1 is none of the 1 images given"):
        kept_patches(Kept([5], [9]), picture, llava_prompt(), config, row=1, index=1)
    matplotlib.pyplot.close("all")


def test_tiles_are_drawn_unless_the_whole_is_asked_for():
    matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib")
    matplotlib.use("Agg")
    config = SimpleNamespace(model_type="internvl", image_seq_length=4, image_token_id=zoo.IMAGE)
    config.get_text_config = lambda decoder: config
    ids = torch.full((1, 20), zoo.TEXT.start)
    ids[0, 3:15] = zoo.IMAGE  # two tiles of 2 x 2, then the whole
    cache = Kept([3, 8], [14])
    cache.kept = lambda layer: None if layer else [cache.heads]
    picture = zoo_processors.picture(20, 40)
    counts = {None: "2 of 8", "tiles": "2 of 8", "whole": "1 of 4"}
    for part, count in counts.items():
        axes = kept_patches(cache, picture, dict(input_ids=ids), config, part=part)
        assert axes.get_title() == f"all layers: {count} patches held"
    (patches,) = held(cache, [(20, 40)], dict(input_ids=ids), config)
    assert patches[5] == (Patch("tiles", 0, 0.75, 0.5, 1), 0.5)
    matplotlib.pyplot.close("all")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'mixkv\[plot\]'"):
        kept_patches(Kept([5], [9]), zoo_processors.picture(8, 8), llava_prompt(), zoo.build("llava").config)
