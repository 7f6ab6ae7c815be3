"""Image rows and text rows: distinguished by the token ids or by a given mask, and never wrongly."""

import copy
import pickle

import pytest
import torch
from support import zoo

import mixkv
from mixkv.selection import scores

SMALL = dict(budget=14, window=6, kernel_size=3)
VISION = [name for name, family in zoo.FAMILIES.items() if family.vision and name != "mllama"]
MODAL = ("image_rows", "text_rows", "redundancy_image", "redundancy_text")


def generate(model, prompts, cache, steps=3, **options):
    return model.generate(**prompts, past_key_values=cache, max_new_tokens=steps, min_new_tokens=steps, **options)


def counted(cache, image):
    """Image rows per layer [B, Hkv], counted from `kept`; ``image`` bool [B, tokens]."""
    result = []
    for layer in range(len(cache.layers)):
        kept = cache.kept(layer)
        if kept is not None:
            seen = [
                [sum(int(at) < image.shape[1] and bool(row[at]) for at in head) for head in heads]
                for row, heads in zip(image, kept, strict=True)
            ]
            kept = torch.tensor(seen)
        result.append(kept)
    return result


def check_rows(cache, image):
    stats = cache.stats()
    expected = counted(cache, image)
    assert sum(rows.sum() for rows in expected if rows is not None) > 0
    for rows, images, texts, lengths in zip(expected, stats["image_rows"], stats["text_rows"], stats["lengths"], strict=True):
        if rows is None:
            assert images is texts is None
            continue
        assert images.equal(rows) and texts.equal(lengths - rows)
    return stats


def check_unknown(cache):
    stats = cache.stats()
    assert all(item is None for name in MODAL for item in stats[name])


@pytest.mark.parametrize("name", VISION)
def test_image_rows_are_those_of_the_placeholders(name):
    model = zoo.build(name)
    batch, _ = zoo.ragged(name, [zoo.FAMILIES[name].min_length + 30, zoo.FAMILIES[name].min_length + 20])
    cache = mixkv.MixKVCache(model, **SMALL)
    generate(model, batch, cache, do_sample=False)
    stats = check_rows(cache, batch["input_ids"] == zoo.IMAGE)
    for layer, images, texts in zip(cache.layers, stats["redundancy_image"], stats["redundancy_text"], strict=True):
        if not hasattr(layer, "store"):
            assert images is texts is None
            continue
        for found in (images, texts):
            assert found.shape == (2, layer.shape[0]) and ((found >= 0) & (found <= 1)).all()
        assert not images.equal(texts)


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "mllama"])
def test_no_image_is_none(name):
    model = zoo.build(name)
    cache = mixkv.MixKVCache(model, **SMALL)
    generate(model, zoo.inputs(name, 40, images=name == "mllama"), cache)
    check_unknown(cache)


def test_redundancy_of_each_kind_is_that_of_its_keys_alone():
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 3, 20, 8, generator=generator) + 0.7
    image = torch.zeros(2, 20, dtype=torch.bool)
    image[0, 5:12] = image[1, 9:11] = True
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :4] = False
    found = scores.modal_redundancy(key, image, valid)
    for row in range(2):
        for kind, chosen in enumerate((image[row], ~image[row] & valid[row])):
            own = key[row : row + 1, :, chosen]
            everything = torch.ones(1, 1, own.shape[2], dtype=torch.bool)
            expected = scores.redundancy(scores.directions(own, everything))
            torch.testing.assert_close(found[row, :, kind], expected[0])
    none = scores.modal_redundancy(key, torch.zeros_like(image), None)
    assert none[..., 0].isnan().all() and not none[..., 1].isnan().any()


def test_stats_hold_the_redundancy_of_the_whole_prompt():
    """A budget beyond the prompt keeps every key, from which it can be computed again."""
    model, prompts = zoo.build("llava"), zoo.inputs("llava", 40, batch=2)
    cache = mixkv.MixKVCache(model, budget=100)
    generate(model, prompts, cache, steps=1)
    stats = cache.stats()
    for index, layer in enumerate(cache.layers):
        key, _, _ = layer.store.padded()
        expected = scores.modal_redundancy(key[:, :, :40], prompts["input_ids"] == zoo.IMAGE, None)
        torch.testing.assert_close(stats["redundancy_image"][index], expected[..., 0])
        torch.testing.assert_close(stats["redundancy_text"][index], expected[..., 1])


def test_padding_is_no_text():
    model = zoo.build("llava_next")
    batch, rows = zoo.ragged("llava_next", [60, 45])
    together, alone = mixkv.MixKVCache(model, **SMALL), mixkv.MixKVCache(model, **SMALL)
    generate(model, batch, together)
    generate(model, rows[1], alone)
    for name in MODAL:
        for ours, own in zip(together.stats()[name], alone.stats()[name], strict=True):
            torch.testing.assert_close(ours[1], own[0])


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)])
def test_rows_follow_beams_and_samples(options):
    model = zoo.build("qwen2_vl")
    batch, _ = zoo.ragged("qwen2_vl", [44, 37])
    cache = mixkv.MixKVCache(model, **SMALL)
    torch.manual_seed(0)
    generate(model, batch, cache, **options)
    copies = options.get("num_beams", 2)
    check_rows(cache, (batch["input_ids"] == zoo.IMAGE).repeat_interleave(copies, 0))


def test_rows_follow_their_selection():
    model, prompts = zoo.build("llava_next"), zoo.ragged("llava_next", [60, 45, 52])[0]
    cache = mixkv.MixKVCache(model, **SMALL)
    generate(model, prompts, cache)
    before, image = cache.stats(), prompts["input_ids"] == zoo.IMAGE
    twin = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    for held in (cache, twin):
        held.batch_select_indices(torch.tensor([2, 0]))
        stats = check_rows(held, image[[2, 0]])
        for name in ("redundancy_image", "redundancy_text"):
            assert all(now.equal(then[[2, 0]]) for now, then in zip(stats[name], before[name], strict=True))
    cache.reset()
    check_unknown(cache)


def test_chunked_prompts_and_drafts_are_one_prompt():
    model, prompts = zoo.build("llava"), zoo.inputs("llava", 50)
    plain, chunked, drafted = (mixkv.MixKVCache(model, **{**SMALL, "budget": 30}) for _ in range(3))
    generate(model, prompts, plain, steps=1)
    model(**prompts, past_key_values=drafted)
    for cache in (plain, drafted):
        check_rows(cache, prompts["input_ids"] == zoo.IMAGE)
    text = {name: prompts[name] for name in ("input_ids", "attention_mask")}  # transformers gives images to no later chunk
    generate(model, text, chunked, prefill_chunk_size=16)
    check_rows(chunked, prompts["input_ids"] == zoo.IMAGE)
    assert chunked.stats()["redundancy_image"][0] is not None
    lookup = mixkv.MixKVCache(model, **SMALL)
    generate(model, prompts, lookup, steps=8, prompt_lookup_num_tokens=3)
    check_rows(lookup, prompts["input_ids"] == zoo.IMAGE)


def test_a_second_turn_with_an_image():
    model, first = zoo.build("llava"), zoo.inputs("llava", 40)
    second = zoo.inputs("llava", 30, seed=5)
    cache = mixkv.MixKVCache(model, **SMALL)
    tokens = generate(model, first, cache)
    ids = torch.cat([tokens, second["input_ids"]], dim=1)
    turn = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=second["pixel_values"])
    generate(model, turn, cache)
    check_rows(cache, ids == zoo.IMAGE)
    assert cache.stats()["image_rows"][0].min() >= 9, "a later turn is kept whole"


def test_a_turn_after_tokens_nobody_knows():
    """A given mask goes with the turn it is given for, even where it cannot make up for the tokens before."""
    model, first, second = zoo.build("llava"), zoo.inputs("llava", 40), zoo.inputs("llava", 30, seed=5)
    cache = mixkv.MixKVCache(model, **SMALL)
    embeds = model.get_input_embeddings()(zoo.inputs("llava", 40, images=False)["input_ids"])
    with torch.no_grad():
        model(inputs_embeds=embeds, past_key_values=cache)
        cache.set_image_mask(torch.ones(1, 30))
        model(input_ids=second["input_ids"], pixel_values=second["pixel_values"], past_key_values=cache)
        check_unknown(cache)
        cache.reset()
        model(**first, past_key_values=cache)
    check_rows(cache, first["input_ids"] == zoo.IMAGE)


def test_tokens_taken_back_are_forgotten():
    model, prompts = zoo.build("llava"), zoo.inputs("llava", 40)
    more = zoo.inputs("llava", 30, seed=5)
    cache = mixkv.MixKVCache(model, **SMALL)
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        before = cache.stats()["image_rows"]
        model(input_ids=more["input_ids"], pixel_values=more["pixel_values"], past_key_values=cache)
        assert cache.stats()["image_rows"][0].gt(before[0]).all()
        cache.crop(-30)
        for token in range(30):
            model(input_ids=torch.full((1, 1), zoo.TEXT.start + token), past_key_values=cache)
    assert all(now.equal(then) for now, then in zip(cache.stats()["image_rows"], before, strict=True))


def test_embeddings_alone_tell_nothing_but_a_given_mask_does():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40, batch=2)
    embeds = model.get_input_embeddings()(prompts["input_ids"])
    image = torch.zeros(2, 40, dtype=torch.long)
    image[0, 3:20] = image[1, 8:30] = 1
    inputs = dict(inputs_embeds=embeds, attention_mask=prompts["attention_mask"])
    unknown, given = mixkv.MixKVCache(model, **SMALL), mixkv.MixKVCache(model, **SMALL)
    generate(model, inputs, unknown)
    check_unknown(unknown)
    given.set_image_mask(image)
    generate(model, inputs, given, num_beams=2)
    check_rows(given, image.bool().repeat_interleave(2, 0))
    with torch.no_grad():
        model(inputs_embeds=embeds[:, :5].repeat_interleave(2, 0), past_key_values=given)
    assert given.stats()["image_rows"][0] is None, "nobody knows about the later tokens"
    assert given.stats()["redundancy_image"][0] is not None, "measured on the prompt"


def test_a_given_mask_is_that_of_all_chunks():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    image = torch.zeros(1, 40, dtype=torch.bool)
    image[0, 8:30] = True
    cache = mixkv.MixKVCache(model, **SMALL)
    cache.set_image_mask(image)
    generate(model, prompts, cache, prefill_chunk_size=16)
    check_rows(cache, image)


def test_a_given_mask_goes_before_the_token_ids():
    model, prompts = zoo.build("llava"), zoo.inputs("llava", 40)
    cache = mixkv.MixKVCache(model, **SMALL)
    image = torch.zeros(1, 40, dtype=torch.bool)
    image[0, 20:39] = True
    cache.set_image_mask(image)
    generate(model, prompts, cache)
    check_rows(cache, image)


def test_masks_that_do_not_fit_are_refused():
    model, prompts = zoo.build("llava"), zoo.inputs("llava", 40, batch=2)
    cache = mixkv.MixKVCache(model, **SMALL)
    with pytest.raises(ValueError, match=r"has shape \[40\]: it must be \[B, N\]"):
        cache.set_image_mask(torch.zeros(40))
    cache.set_image_mask(torch.zeros(2, 39))
    with pytest.raises(ValueError, match=r"has shape \[2, 39\], but a batch of 2 rows of 40 tokens is read"):
        generate(model, prompts, cache)
    generate(model, prompts, cache)
    check_rows(cache, prompts["input_ids"] == zoo.IMAGE)


def test_a_failed_forward_leaves_no_mask_behind():
    model, prompts = zoo.build("llava"), zoo.inputs("llava", 40)
    cache = mixkv.MixKVCache(model, **SMALL)
    padded = torch.ones_like(prompts["attention_mask"])
    padded[:, -3:] = 0
    with pytest.raises(ValueError, match="padded on the right"):
        model(**prompts | dict(attention_mask=padded), past_key_values=cache)
    check_unknown(cache)
    other = zoo.inputs("llava", 40, seed=9)
    generate(model, other, cache)
    check_rows(cache, other["input_ids"] == zoo.IMAGE)


def test_video_tokens_count_as_images():
    model = zoo.build("qwen2_vl")
    prompts = zoo.inputs("qwen2_vl", 44)
    generator = torch.Generator().manual_seed(0)
    ids = torch.where(prompts["input_ids"] == zoo.IMAGE, zoo.VIDEO, prompts["input_ids"])
    video = dict(
        input_ids=ids,
        attention_mask=prompts["attention_mask"],
        pixel_values_videos=torch.randn(24, 96, generator=generator),
        video_grid_thw=prompts["image_grid_thw"],
        mm_token_type_ids=2 * prompts["mm_token_type_ids"],
    )
    cache = mixkv.MixKVCache(model, method="adakv", **SMALL)
    generate(model, video, cache)
    check_rows(cache, ids == zoo.VIDEO)
