"""Pictures show the numbers of the cache, and matplotlib is imported when one is drawn."""

import subprocess
import sys

import pytest
import torch
from support import zoo

import mixkv
from mixkv import MixKVCache, plot
from mixkv.plot import heads, text

matplotlib = pytest.importorskip("matplotlib", reason="needs mixkv[plot]")
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

SMALL = dict(budget=14, window=6, kernel_size=3)


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


class Tokenizer:
    """Token 7 is a line break, 8 is what mathtext and fonts trip over, every other one a word."""

    pad_token_id = zoo.PAD

    def decode(self, ids):
        return {7: "\n", 8: "$a$\t"}.get(ids[0], f" w{ids[0]}")


def read(name="gemma3", lengths=(48, 41)):
    model, prompts = zoo.build(name), zoo.ragged(name, list(lengths))[0]
    cache = MixKVCache(model, **SMALL)
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
    return cache, prompts["input_ids"]


def drawn_numbers(ax):
    return ax.images[0].get_array().filled(-1)


@pytest.mark.parametrize("name", ["budgets", "redundancy"])
@pytest.mark.parametrize("row", [0, 1])
def test_heat_maps_show_the_numbers_of_stats(name, row):
    cache, _ = read()
    ax = getattr(plot, name)(cache, row=row)
    numbers = drawn_numbers(ax)
    expected = cache.stats()["lengths" if name == "budgets" else "redundancy"]
    assert numbers.shape == (3, 2)
    for layer, part in enumerate(expected):
        assert numbers[layer].tolist() == ([-1, -1] if part is None else part[row].tolist())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("KV head", "layer")
    ax.figure.canvas.draw()
    for part in ax.figure.axes:
        box = part.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= ax.figure.bbox.width and box.y1 <= ax.figure.bbox.height


def test_sparsity_shows_the_map_of_heads():
    model, prompts = zoo.build("gemma3"), zoo.inputs("gemma3", 300, batch=2)
    cache = MixKVCache(model, method="hybridkv", budget=110, window=6, hybrid_threshold=0.0125)
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
    ax = plot.sparsity(cache, row=1)
    numbers, marked = drawn_numbers(ax), ax.collections[0].get_offsets().tolist()
    found = cache.stats()
    for layer, (sparse, dynamic) in enumerate(zip(found["sparsity"], found["dynamic"])):
        assert numbers[layer].tolist() == ([-1, -1] if sparse is None else sparse[1].tolist())
        for head in range(2):
            assert ([head, layer] in marked) == (dynamic is not None and bool(dynamic[1, head]))
    assert marked
    assert [part.get_text() for part in ax.get_legend().get_texts()] == ["dynamic head"]
    with pytest.raises(ValueError, match="method='global' does not classify"):
        plot.sparsity(read()[0])


def test_heat_maps_are_drawn_on_given_axes():
    cache, _ = read("llama")
    _, (left, right) = pyplot.subplots(1, 2)
    assert plot.budgets(cache, ax=left) is left and plot.redundancy(cache, ax=right) is right
    assert len(pyplot.get_fignums()) == 1 and right.images


def test_layers_with_fewer_heads_are_filled_up_with_blanks():
    found = heads.grid([torch.tensor([[1, 2, 3]]), None, torch.tensor([[4]])], 0)
    assert found.nan_to_num(-1).tolist() == [[1, 2, 3], [-1, -1, -1], [4, -1, -1]]


def test_shares_count_the_heads_that_kept():
    cache, ids = read("llama")
    for row in range(2):
        kept = [[set(part.tolist()) for part in cache.kept(layer)[row]] for layer in range(3)]
        for layer, head in [(None, None), (1, None), (None, 0), (2, 1)]:
            chosen = [
                kept[index][part] for index in range(3) for part in range(2) if layer in (None, index) and head in (None, part)
            ]
            expected = [sum(column in part for part in chosen) / len(chosen) for column in range(48)]
            assert text.shares(cache, 48, layer=layer, head=head, row=row).tolist() == pytest.approx(expected)
    assert text.shares(cache, 48, row=1)[:7].sum() == 0, "padding is never kept"


def test_text_is_drawn_whole_in_the_colour_of_its_share():
    cache, ids = read()
    ids = ids.clone()
    ids[1, 20], ids[1, 30] = 7, 8
    ax = plot.kept(cache, Tokenizer(), ids, row=1, width=40)
    shown = [part.get_text() for part in ax.texts]
    assert "".join(shown) == "".join(Tokenizer().decode([token]) for token in ids[1, 7:].tolist()).replace("\n", "↵").replace(
        "\t", "    "
    )
    places = [(part.get_position()[1], part.get_position()[0]) for part in ax.texts]
    assert places == sorted(set(places)) and all(start + len(part) <= 40 for (_, start), part in zip(places, shown))
    colours = ax.collections[0].get_facecolors()
    share = text.shares(cache, 48, row=1)[7:].tolist()
    assert len(colours) == len(shown) == len(share)
    expected = [1 - part**0.5 * (1 - 0x4A / 255) for part in share]
    assert [float(colour[0]) for colour in colours] == pytest.approx(expected, abs=0.01)
    inks = [part.get_color() for part in ax.texts]
    assert inks == ["black" if part else text.EVICTED_TEXT for part in share] and len(set(inks)) == 2


@pytest.mark.parametrize("given", [False, True], ids=["new figure", "given Axes"])
def test_the_text_fills_its_axes_and_has_a_colour_bar(given):
    cache, ids = read("llama", (48, 48))
    ax = pyplot.subplots(figsize=(4, 6), layout="constrained")[1] if given else None
    ax = plot.kept(cache, Tokenizer(), ids, width=40, ax=ax)
    figure = ax.figure
    figure.canvas.draw()
    bar = next(other for other in figure.axes if other is not ax)
    assert [text.get_text() for text in bar.get_xticklabels()] == ["0 (evicted)", "5%", "20%", "50%", "all"]
    for other in figure.axes:
        box = other.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    for piece in ax.texts:
        box = piece.get_window_extent().transformed(ax.transData.inverted())
        assert box.width == pytest.approx(len(piece.get_text()), rel=0.15), "a character is one unit wide"


def test_lay_out():
    pieces = text.lay_out(["ab", "cd", "\n", "", "efghijkl", "m\nn"], 5)
    assert [tuple(piece) for piece in pieces] == [
        (0, 0, 0, "ab"),
        (1, 0, 2, "cd"),
        (2, 0, 4, "↵"),
        (4, 1, 0, "efghi"),
        (4, 2, 0, "jkl"),
        (5, 2, 3, "m↵"),
        (5, 3, 0, "n"),
    ]


def test_kept_takes_one_row_of_ids_an_ax_and_a_longer_cache():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 48)
    cache = MixKVCache(model, **SMALL)
    model.generate(**prompts, max_new_tokens=4, do_sample=False, past_key_values=cache)
    _, given = pyplot.subplots(figsize=(4, 8))
    assert plot.kept(cache, Tokenizer(), prompts["input_ids"][0], ax=given, layer=0, head=1) is given
    assert len(pyplot.get_fignums()) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layer=0), r"layer=0 is not compressed; choose from \[1\]"),
        (dict(head=2), "head=2 must be from 0 to 1"),
        (dict(row=-1), "row=-1 must be from 0 to 1"),
    ],
)
def test_kept_names_what_is_wrong(options, message):
    cache, ids = read()
    with pytest.raises(ValueError, match=message):
        plot.kept(cache, Tokenizer(), ids, **options)
    with pytest.raises(ValueError, match="input_ids has 96 tokens and this cache has read 48"):
        plot.kept(cache, Tokenizer(), torch.cat([ids, ids], dim=1))


def test_an_empty_cache_and_a_missing_row():
    model = zoo.build("llama")
    for draw in (plot.budgets, plot.redundancy, lambda cache: plot.kept(cache, Tokenizer(), torch.ones(1, 3))):
        for cache in (MixKVCache(model, **SMALL), MixKVCache(**SMALL)):
            with pytest.raises(ValueError, match="this cache is empty"):
                draw(cache)
    with pytest.raises(ValueError, match="row=2 must be from 0 to 1"):
        plot.budgets(read()[0], row=2)


def record(method, budget=900, kl=0.0, **more):
    return {"method": method, "score": "mix", "budget": budget, "bytes": budget * 2**20, "kl": kl, **more}


def test_tradeoff_draws_a_line_a_method_in_order_of_size():
    results = [record("full"), record("adakv", 128, 0.2, kl_low=0.15, kl_high=0.4)]
    results += [record("snapkv", 64, 0.5), record("adakv", 64, 0.4, kl_low=0.3, kl_high=0.5)]
    ax = plot.tradeoff(results)
    handles, labels = ax.get_legend_handles_labels()
    drawn = dict(zip(labels, handles))
    assert sorted(labels) == ["adakv, mix", "full cache", "snapkv, mix"]
    line, _, (bars,) = drawn["adakv, mix"]
    assert line.get_xydata().tolist() == [[64, 0.4], [128, 0.2]]
    assert [segment[:, 1].round(6).tolist() for segment in bars.get_segments()] == [[0.3, 0.5], [0.15, 0.4]]
    assert not drawn["snapkv, mix"][2], "no interval, no bar"
    assert ax.get_xlabel() == "size of the cache (MiB)" and "KL" in ax.get_ylabel()


def test_tradeoff_by_other_numbers():
    results = [dict(method="adakv", score=score, budget=64, accuracy=0.5) for score in ("mix", "attn")]
    _, given = pyplot.subplots()
    ax = plot.tradeoff(results, quality="accuracy", ax=given)
    assert ax is given and (ax.get_xlabel(), ax.get_ylabel()) == ("budget (entries per KV head)", "accuracy")
    assert len(ax.get_legend_handles_labels()[1]) == 2


@pytest.mark.parametrize(
    "results, message",
    [
        ([], "results is empty"),
        ([record("adakv", 64, 0.1), record("adakv", 32, None)], r"record 1 of results \(adakv, mix, budget 32\) has no 'kl'"),
        ([dict(method="adakv", score="mix", kl=0.1)], "has no 'bytes'"),
        ([record("adakv", 64, 0.1, kl_low=0.2, kl_high=0.3)], "kl=0.1 outside its interval from 0.2 to 0.3"),
    ],
)
def test_tradeoff_names_what_is_wrong(results, message):
    with pytest.raises(ValueError, match=message):
        plot.tradeoff(results)


def test_the_notebook_view_has_both_pictures():
    cache, _ = read()
    html = cache._repr_html_()
    assert html.count("<svg") == 2 and html.count("<rect") == 4
    number = float(cache.stats()["redundancy"][1][0, 1])
    assert f"layer 1, head 1: {number:.2f}" in html and "redundancy per layer and head" in html


def test_matplotlib_is_imported_when_something_is_drawn_and_named_when_missing():
    code = (
        "import sys, mixkv, mixkv.plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n    mixkv.plot.tradeoff([dict(method='adakv', score='mix', budget=1, kl=0.1)])\n"
        "except ImportError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "plots need matplotlib: pip install 'mixkv[plot]'"
    assert mixkv.plot is plot
