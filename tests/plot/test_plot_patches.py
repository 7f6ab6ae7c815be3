"""`mixkv.plot.kept_patches`: the share of KV heads that keep each patch, and what is drawn of it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from support import zoo, zoo_processors

import mixkv
from mixkv.plot.grid import Patch, locate
from mixkv.plot.patches import kept_patches, patch_legend, patch_shares, veil

FAMILIES = [name for name in zoo_processors.RECIPES if name != "mllama"]
SMALL = dict(budget=14, window=6, kernel_size=3)


class Kept:
    """A cache of two layers of two heads that keeps given positions in batch row 1; layer 0 is not compressed."""

    def __init__(self, *heads):
        self.layers, self.heads = [None] * 2, [torch.tensor(head, dtype=torch.int32) for head in heads]

    def kept(self, layer):
        return None if layer == 0 else [[torch.arange(3), torch.arange(3)], self.heads]


def llava_prompt():
    ids = torch.full((2, 20), zoo.TEXT.start)
    ids[0, 2:11] = ids[1, 5:14] = zoo.IMAGE
    return dict(input_ids=ids)


def test_kept_patches_are_those_of_the_kept_positions():
    """Positions 5 to 13 are the 3 x 3 patches; 30 is a generated token."""
    cache, config = Kept([1, 5, 9, 30], [9, 13, 14]), zoo.build("llava").config
    (found,) = patch_shares(cache, [(24, 24)], llava_prompt(), config, row=1)
    assert [share for _, share in found] == [0.5, 0, 0, 0, 1, 0, 0, 0, 0.5]
    assert found[4][0][1:] == pytest.approx((1 / 3, 1 / 3, 2 / 3, 2 / 3))
    (found,) = patch_shares(cache, [(24, 24)], llava_prompt(), config, row=1, head=1)
    assert [share for _, share in found] == [0, 0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layer=2), r"layer=2 is not compressed; choose from \[1\]"),
        (dict(layer=0), r"layer=0 is not compressed; choose from \[1\]"),
        (dict(row=2), "row=2 must be from 0 to 1: the cache holds a batch of 2"),
        (dict(head=2), "head=2 must be from 0 to 1: there are 2 KV heads"),
    ],
)
def test_places_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        patch_shares(Kept([1], [2]), [(24, 24)], llava_prompt(), zoo.build("llava").config, **options)


def test_mllama_has_nothing_to_draw():
    with pytest.raises(ValueError, match="mllama has no image tokens in its self-attention"):
        patch_shares(Kept([1], [2]), [(24, 24)], llava_prompt(), zoo.build("mllama").config)


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
        (found,) = patch_shares(cache, [size], prompts, model.config, row=row)
        separators = separators_kept(cache, model.config, size, prompts, row)
        ours = [rows[row] for rows in stats["image_rows"] if rows is not None]
        heads = sum(len(rows) for rows in ours)
        assert sum(share for _, share in found) * heads + separators == pytest.approx(float(sum(map(torch.sum, ours))))


def separators_kept(cache, config, size, prompts, row):
    columns = (prompts["input_ids"][row] == zoo.IMAGE).nonzero().flatten()
    own = prompts["image_grid_thw"][row : row + 1].tolist() if "image_grid_thw" in prompts else None
    (patches,) = locate(config, [size], len(columns), own)
    blank = {int(column) for column, patch in zip(columns, patches) if patch is None}
    kept = [cache.kept(layer) for layer in range(len(cache.layers))]
    return sum(int(column) in blank for found in kept if found is not None for head in found[row] for column in head)


def test_beams_lie_next_to_each_other():
    config = zoo.build("llava").config
    one = dict(input_ids=llava_prompt()["input_ids"][1:])
    (found,) = patch_shares(Kept([5], [5]), [(24, 24)], one, config, row=1)
    assert [share for _, share in found] == [1] + 8 * [0]
    three = dict(input_ids=torch.cat([one["input_ids"]] * 3))
    with pytest.raises(ValueError, match="the cache holds a batch of 2, and inputs are 3 prompts"):
        patch_shares(Kept([5], [5]), [(24, 24)], three, config)


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_evicted_patches_fade_and_kept_ones_can_be_read(pyplot):
    picture, config = zoo_processors.picture(30, 60), zoo.build("llava").config
    axes = kept_patches(Kept([5, 9], [9]), picture, llava_prompt(), config, row=1, layer=1)
    veils, cut_off = axes.collections
    evicted, half = veil(0), veil(0.5)
    assert veils.get_facecolor()[:, 3] == pytest.approx([half] + 3 * [evicted] + [0] + 4 * [evicted])
    assert 1 > evicted > veil(1e-3) > half > veil(1) == 0 and veil(1e-3) <= 0.5 < evicted - 0.2
    assert (veils.get_facecolor()[:, :3] > 0.6).all(), "to a light grey"
    assert cut_off.get_facecolor()[0, :3].tolist() == [1, 1, 1] and cut_off.get_hatch()
    corners = [path.vertices[:4].tolist() for path in [*veils.get_paths(), *cut_off.get_paths()]]
    assert corners[9][2] == pytest.approx([15, 30]) and corners[10][0] == pytest.approx([45, 0])
    assert corners[0][0] == pytest.approx([15, 0]) and corners[4][2] == pytest.approx([35, 20])
    assert axes.images[0].get_extent() == [0, 60, 30, 0]


def test_the_colour_bar_shows_white_paper_under_the_veil(pyplot):
    picture, config = zoo_processors.picture(24, 24), zoo.build("llava").config
    cache = Kept([5, 9], [9])
    axes = kept_patches(cache, picture, llava_prompt(), config, row=1)
    figure, (left, right) = pyplot.subplots(1, 2, layout="compressed")
    for ax in (left, right):
        assert kept_patches(cache, [picture], llava_prompt(), config, row=1, ax=ax, legend=False) is ax
    assert len(figure.axes) == 2, "no colour bar of its own"
    for bar in (axes.figure.axes[-1]._colorbar, patch_legend([left, right])):
        assert bar.ax.get_xlabel() == "share of KV heads that keep the patch"
        assert [text.get_text() for text in bar.ax.get_xticklabels()] == ["0 (evicted)", "5%", "20%", "50%", "all"]
        (red, *_), *_ = axes.collections[0].get_facecolor()
        for share in (0.01, 0.05, 0.5, 1):
            assert bar.mappable.to_rgba(share)[0] == pytest.approx(1 - veil(share) * (1 - red), abs=0.01)
        assert bar.mappable.to_rgba(-1)[0] == pytest.approx(1 - veil(0) * (1 - red), abs=0.01)
        assert bar.extend == "min"


@pytest.mark.parametrize("size", [(24, 24), (20, 60), (60, 20)])
def test_titles_and_labels_lie_within_the_picture(pyplot, size):
    config = zoo.build("llava").config
    axes = kept_patches(Kept([5, 9], [9]), zoo_processors.picture(*size), llava_prompt(), config, row=1, layer=1, head=0)
    assert_nothing_is_cut_off(axes.figure)


def assert_nothing_is_cut_off(figure):
    figure.canvas.draw()
    for axes in figure.axes:
        box, whole = axes.get_tightbbox(), figure.bbox
        assert box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1 and box.y0 >= whole.y0 - 1 and box.y1 <= whole.y1 + 1


@pytest.mark.parametrize("options", [dict(part="tiles"), dict(index=1)])
def test_images_and_parts_that_do_not_exist(pyplot, options):
    picture, config = zoo_processors.picture(30, 60), zoo.build("llava").config
    message = (
        "part='tiles' is none of what this image has: whole" if "part" in options else "index=1 is none of the 1 images given"
    )
    with pytest.raises(ValueError, match=message):
        kept_patches(Kept([5], [9]), picture, llava_prompt(), config, row=1, **options)


def test_tiles_are_drawn_unless_the_whole_is_asked_for(pyplot):
    config = SimpleNamespace(model_type="internvl", image_seq_length=4, image_token_id=zoo.IMAGE)
    config.get_text_config = lambda decoder: config
    ids = torch.full((1, 20), zoo.TEXT.start)
    ids[0, 3:15] = zoo.IMAGE  # two tiles of 2 x 2, then the whole
    cache = Kept([3, 8], [14])
    cache.kept = lambda layer: None if layer else [cache.heads]
    picture = zoo_processors.picture(20, 40)
    kept = {None: (8, [0, 5]), "tiles": (8, [0, 5]), "whole": (4, [3])}
    for part, (count, half) in kept.items():
        drawn = kept_patches(cache, picture, dict(input_ids=ids), config, part=part).collections[0].get_facecolor()[:, 3]
        assert drawn == pytest.approx([veil(0.5) if index in half else veil(0) for index in range(count)])
    (patches,) = patch_shares(cache, [(20, 40)], dict(input_ids=ids), config)
    assert patches[5] == (Patch("tiles", 0, 0.75, 0.5, 1), 0.5)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'mixkv\[plot\]'"):
        kept_patches(Kept([5], [9]), zoo_processors.picture(8, 8), llava_prompt(), zoo.build("llava").config)
