"""`mixkv.plot.kept_patches`: the share of heads that hold each patch, and what is drawn of it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from support import zoo, zoo_processors

import mixkv
from mixkv.plot.grid import Patch, locate
from mixkv.plot.patches import held, kept_patches

FAMILIES = [name for name in zoo_processors.RECIPES if name != "mllama"]
SMALL = dict(budget=14, window=6, kernel_size=3)


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
        (dict(row=2), "row=2: the batch size of this cache is 2"),
        (dict(head=2), "head=2: this model has 2 KV heads"),
    ],
)
def test_places_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        held(Kept([1], [2]), [(24, 24)], llava_prompt(), zoo.build("llava").config, **options)


def test_mllama_has_nothing_to_draw():
    with pytest.raises(ValueError, match="mllama has no image tokens in its self-attention"):
        held(Kept([1], [2]), [(24, 24)], llava_prompt(), zoo.build("mllama").config)


@pytest.mark.parametrize("name", FAMILIES)
def test_shares_add_up_to_the_rows_that_stats_counts(name):
    """In a padded batch with images of different size."""
    processor, model = zoo_processors.build(name), zoo.build(name)
    sizes = [(24, 40), (24, 24)]
    prompts = zoo_processors.encode(processor, [[zoo_processors.picture(*size)] for size in sizes], lengths=[24, 17])
    cache = mixkv.MixKVCache(model, **SMALL)
    model.generate(**prompts, past_key_values=cache, max_new_tokens=2)
    stats = cache.stats()
    for row, size in enumerate(sizes):
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
    with pytest.raises(ValueError, match="the batch size of this cache is 2, and inputs have 3 prompts"):
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
    with pytest.raises(ValueError, match="unknown part 'tiles' of this image; choose from whole"):
        kept_patches(Kept([5], [9]), picture, llava_prompt(), config, row=1, part="tiles")
    with pytest.raises(ValueError, match="index=1 must be from 0 to 0: 1 images were given"):
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
