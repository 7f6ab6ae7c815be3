"""Head scores against eager attention and plain loops."""

from functools import partial

import pytest
import torch
from support import zoo, zoo_processors
from support.asked_pages import SIZES, ask, load
from transformers import DynamicCache

from mixkv.evaluation import boxes, calibrate, watch
from mixkv.plot.grid import locate

FAMILIES = [name for name in zoo_processors.RECIPES if name != "mllama"]


def shows(patch, size, box):
    """Whether any of many rows of points, and any of many columns, inside a box lie in a patch."""
    inside = [(index + 0.5) / 1000 for index in range(1000)]
    down = any(patch.top < (box.top + (box.bottom - box.top) * share) / size[0] < patch.bottom for share in inside)
    return down and any(patch.left < (box.left + (box.right - box.left) * share) / size[1] < patch.right for share in inside)


def by_hand(loaded, asked):
    """Tokens in boxes, those right, and the scores "layer-head", from one eager forward that keeps all attention."""
    aligned = boxes.align(loaded, asked)
    ids = aligned.inputs["input_ids"][0].tolist()
    with torch.no_grad():
        out = loaded.model(**aligned.inputs, output_attentions=True)
    columns = [column for column, token in enumerate(ids) if token == zoo.IMAGE]
    sizes = [(image.height, image.width) for image in asked.images]
    grids = aligned.inputs["image_grid_thw"].tolist() if "image_grid_thw" in aligned.inputs else None
    patches = [
        (image, patch) for image, own in enumerate(locate(loaded.model.config, sizes, len(columns), grids)) for patch in own
    ]
    kinds = zoo.FAMILIES[loaded.name].text_config.get("layer_types")
    layers = [index for index in range(len(out.attentions)) if kinds is None or kinds[index] == "full_attention"]
    words = asked.answer.split()
    boxed, right, found = 0, 0, {}
    for index, word in enumerate(words):
        at = len(ids) - len(words) + index
        assert loaded.tokenizer.convert_ids_to_tokens(ids[at]) == word
        start = len(" ".join([*words[:index], ""]))
        own = [box for box in asked.boxes if box.start == start]
        shown = {
            column
            for column, (image, patch) in zip(columns, patches)
            for box in own
            if box.image == image and patch is not None and shows(patch, sizes[image], box)
        }
        if not shown:
            continue
        boxed += 1
        if int(out.logits[0, at - 1].argmax()) != ids[at]:
            continue
        right += 1
        for ordinal, layer in enumerate(layers):
            for head in range(4):
                weights = out.attentions[layer][0, head, at - 1].tolist()
                if weights.index(max(weights)) in shown:
                    name = f"{ordinal}-{head}"
                    found[name] = found.get(name, 0) + 1 / len(shown)
    return boxed, right, found


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_eager_attention(name, images):
    if (name, images) == ("internvl", 2):
        pytest.skip("which tile is whose cannot be told")
    eager = load(name, "eager")
    implementations = [eager, *([load(name, "sdpa")] if "sdpa" in zoo.FAMILIES[name].attn else [])]
    asked = [ask(eager, SIZES[:images], seed) for seed in range(6)]
    expected = [by_hand(eager, one) for one in asked]
    assert sum(right for _, right, _ in expected) > 0 and any(boxed > right for boxed, right, _ in expected)
    assert any(found for _, _, found in expected)
    for loaded in implementations:
        pages = [(("page", 0, seed), partial(boxes.align, loaded, one)) for seed, one in enumerate(asked)]
        for record, (boxed, right, found) in zip(calibrate.run(loaded, pages), expected, strict=True):
            assert (record["boxed"], record["right"]) == (boxed, right)
            assert record["scores"] == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3_vision"])
def test_heads_look_where_they_do_while_decoding_on_the_full_cache(name):
    """The image read first, then the answer token by token on the cache it left."""
    loaded = load(name, "eager")
    inputs = boxes.align(loaded, ask(loaded, SIZES[:1], 3)).inputs
    length = inputs["input_ids"].shape[1]
    columns = list(range(length - 8, length))
    logits, most = watch.most_attended(loaded.model, inputs, columns)
    loaded = load(name, "eager")
    cache = DynamicCache(config=loaded.model.config)
    aligned = [name for name, value in inputs.items() if name != "pixel_values" and value.shape[-1] == length]
    prompt = inputs | {name: inputs[name][:, : columns[0]] for name in aligned}
    options = dict(past_key_values=cache, use_cache=True, output_attentions=True)
    kinds = zoo.FAMILIES[name].text_config.get("layer_types")
    with torch.no_grad():
        loaded.model(**prompt, **options)
        for row, column in enumerate(columns):
            out = loaded.model(input_ids=inputs["input_ids"][:, column : column + 1], **options)
            torch.testing.assert_close(out.logits[0, -1], logits[row], atol=1e-4, rtol=1e-4)
            full = [part for index, part in enumerate(out.attentions) if kinds is None or kinds[index] == "full_attention"]
            assert [part[0, :, -1].argmax(-1).tolist() for part in full] == most[:, :, row].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, groups, size, length", [(1, 1, 3, 1), (2, 3, 16, 37), (3, 1, 80, 130)])
def test_the_highest_product_is_that_of_plain_loops(heads, groups, size, length, dtype):
    generator = torch.Generator().manual_seed(length)
    query, key = (torch.randn(2, count, length, size, generator=generator).to(dtype) for count in (heads * groups, heads))
    columns = torch.tensor(sorted({0, length // 2, length - 1}))
    found = watch.highest(query[:, :, columns], key, columns)
    for row in range(2):
        for head in range(heads * groups):
            for index, column in enumerate(columns.tolist()):
                products = [
                    float(query[row, head, column].double() @ key[row, head // groups, other].double())
                    for other in range(column + 1)
                ]
                assert found[row, head, index] == products.index(max(products))
