"""`mixkv.plot.explore`: one position of the slider for each budget, with what is kept and the model's answer."""

import base64
import io
import re
import subprocess
import sys

import pytest
from PIL import Image
from support import text_models, zoo, zoo_processors

import mixkv
from mixkv import MixKVCache
from mixkv.plot import slider, text

SMALL = dict(window=6, kernel_size=3)


@pytest.fixture(scope="module")
def language():
    return text_models.make_model(), text_models.make_tokenizer()


def test_views_show_what_a_cache_with_that_budget_keeps_and_answers(language):
    model, tokenizer = language
    prompt = tokenizer(text_models.make_text(60), return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    found = slider.views(model, tokenizer, prompt, budgets=(30, 12, 500), max_new_tokens=5, **SMALL)
    assert [view.budget for view in found] == [12, 30, None], "ascending, below the length of the prompt, and the full cache"
    for view in found:
        cache = MixKVCache(model, budget=view.budget or length, **SMALL)
        options = {} if view.budget is None else {"past_key_values": cache}
        tokens = model.generate(**prompt, max_new_tokens=5, do_sample=False, **options)
        assert view.answer == tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
        if view.budget:
            assert view.nbytes == cache.stats()["bytes"]
            assert view.picture == slider.text_html(
                tokenizer, prompt["input_ids"][0].tolist(), text.shares(cache, length).tolist()
            )
    assert text.EVICTED_TEXT in found[0].picture and text.EVICTED_TEXT not in found[-1].picture
    assert found[0].nbytes < found[1].nbytes < found[2].nbytes


def test_a_text_is_tokenized(language):
    model, tokenizer = language
    words = text_models.make_text(40)
    given = dict(budgets=(12,), max_new_tokens=2, **SMALL)
    assert slider.views(model, tokenizer, words, **given) == slider.views(
        model, tokenizer, tokenizer(words, return_tensors="pt"), **given
    )
    with pytest.raises(ValueError, match="prompt has 2 rows of input_ids: give one"):
        slider.views(model, tokenizer, tokenizer([words, words], return_tensors="pt"), **given)


class Letters:
    def decode(self, ids):
        return {0: "<b>"}.get(ids[0], chr(ids[0]))


def test_the_html_has_all_of_the_text_in_runs_of_one_shade():
    found = slider.text_html(Letters(), [0, 97, 10, 98, 99], [0.25, 0.25, 0.0, 1.0, 1.0])
    spans = re.findall(r'<span style="(.*?)">(.*?)</span>', found, re.DOTALL)
    assert [words for _, words in spans] == ["&lt;b&gt;a", "\n", "bc"]
    assert ["0.5)" in spans[0][0], spans[1][0], "1.0)" in spans[2][0]] == [True, f"color:{text.EVICTED_TEXT}", True]


def test_a_page_is_drawn_for_each_budget():
    pytest.importorskip("matplotlib").use("Agg")
    processor, model = zoo_processors.build("llava"), zoo.build("llava")
    image = zoo_processors.picture(24, 24)
    prompts = zoo_processors.encode(processor, [[image]], lengths=[30])
    found = slider.views(model, processor.tokenizer, prompts, image=image, budgets=(14,), max_new_tokens=2, **SMALL)
    drawn = [
        Image.open(io.BytesIO(base64.b64decode(re.search('base64,(.*?)"', view.picture).group(1)))).convert("L")
        for view in found
    ]
    assert drawn[0].size == drawn[1].size and drawn[0] != drawn[1]
    from matplotlib import pyplot

    assert not pyplot.get_fignums(), "figures are closed"


def test_the_slider_chooses_a_view_in_the_browser(language):
    ipywidgets = pytest.importorskip("ipywidgets", reason="needs mixkv[notebook]")
    model, tokenizer = language
    prompt = tokenizer(text_models.make_text(60), return_tensors="pt")
    options = dict(budgets=(12, 30), max_new_tokens=3, **SMALL)
    box = mixkv.plot.explore(model, tokenizer, prompt, **options)
    moved, stack = box.children
    assert list(moved.options) == ["12", "30", "all"] and stack.selected_index == moved.index
    assert box.link.source == (moved, "index") and box.link.target == (stack, "selected_index")
    assert isinstance(box.link, ipywidgets.widgets.widget_link.Link)
    for view, page in zip(slider.views(model, tokenizer, prompt, **options), stack.children, strict=True):
        assert view.picture in page.value and view.answer in page.value and f"{view.nbytes / 2**20:.2f} MiB" in page.value


def test_without_ipywidgets_the_extra_is_named():
    code = (
        "import sys, mixkv, mixkv.plot\n"
        "assert 'ipywidgets' not in sys.modules\n"
        "sys.modules['ipywidgets'] = None\n"
        "try:\n    mixkv.plot.explore(None, None, 'text')\n"
        "except ImportError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "explore needs ipywidgets: pip install 'mixkv[notebook]'"


def test_a_prompt_shorter_than_every_budget_has_the_full_cache_only(language):
    model, tokenizer = language
    (view,) = slider.views(model, tokenizer, text_models.make_text(20), max_new_tokens=1)
    assert view.budget is None and text.EVICTED_TEXT not in view.picture
