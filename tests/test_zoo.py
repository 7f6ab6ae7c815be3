"""The zoo itself, on the stock cache: what other tests take for granted about its models and prompts."""

import math

import pytest
import torch
from support import zoo

CASES = list(zoo.cases())
VISION = [name for name, family in zoo.FAMILIES.items() if family.vision]
MROPE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def generate(model, prompts, steps=4):
    """(logits [B, steps, V], new tokens [B, steps]) of greedy generation."""
    length = prompts["input_ids"].shape[1]
    settings = dict(max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True)
    out = model.generate(**prompts, **settings)
    return torch.stack(out.logits, dim=1), out.sequences[:, length:]


@pytest.mark.parametrize("extra", [0, 30])
@pytest.mark.parametrize("name, attn", CASES)
def test_generates(name, attn, extra):
    length = zoo.FAMILIES[name].min_length + extra
    prompts = zoo.inputs(name, length, batch=2)
    logits, tokens = generate(zoo.build(name, attn), prompts)
    assert prompts["input_ids"].shape == prompts["attention_mask"].shape == (2, length)
    assert logits.isfinite().all() and tokens.shape == (2, 4)
    assert not set(tokens.flatten().tolist()) & set(zoo.SPECIAL)


@pytest.mark.parametrize("name, attn", CASES)
def test_left_padded_rows_match_rows_alone(name, attn):
    model = zoo.build(name, attn)
    short = zoo.FAMILIES[name].min_length + 3
    batch, rows = zoo.ragged(name, [short, short + 17])
    together, tokens = generate(model, batch)
    for index, row in enumerate(rows):
        alone, own_tokens = generate(model, row)
        torch.testing.assert_close(together[index], alone[0], atol=1e-4, rtol=0)
        assert tokens[index].equal(own_tokens[0])


@pytest.mark.parametrize("name", VISION)
def test_vision_families_take_text_alone(name):
    prompts = zoo.inputs(name, 12, batch=2, images=False)
    assert set(prompts) == {"input_ids", "attention_mask"}
    logits, _ = generate(zoo.build(name), prompts)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", VISION)
def test_logits_depend_on_the_image(name):
    model, prompts = zoo.build(name), zoo.inputs(name, 40)
    logits, _ = generate(model, prompts, steps=1)
    negative, _ = generate(model, prompts | {"pixel_values": -prompts["pixel_values"]}, steps=1)
    assert (logits - negative).std() > 0.05 * logits.std()


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_attention_is_neither_uniform_nor_one_hot(name):
    prompts = zoo.inputs(name, 48)
    with torch.no_grad():
        attentions = zoo.build(name, "eager")(**prompts, output_attentions=True).attentions
    for weights in attentions:
        last = weights[0, :, -1] / weights[0, :, -1].sum(-1, keepdim=True)  # [Hq, n], without the share of a sink
        visible = (last > 0).sum(-1)
        assert (last.amax(-1) > 2 / visible).all()
        entropy = -torch.special.xlogy(last, last).sum(-1).mean()
        assert 0.2 < entropy < 0.9 * math.log(visible.max())


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_weights_follow_the_seed(name):
    state = torch.get_rng_state()
    first, again, other = (list(zoo.build(name, "eager", seed).parameters()) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("name", [name for name, family in zoo.FAMILIES.items() if len(family.attn) == 2])
def test_eager_and_sdpa_are_one_model(name):
    if zoo.FAMILIES[name].sdpa_config:
        pytest.skip(zoo.FAMILIES[name].notes)
    prompts = zoo.inputs(name, 40)
    eager, sdpa = (generate(zoo.build(name, attn), prompts)[0] for attn in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_sliding_families_mix_layer_types(name):
    config = zoo.build(name, "eager").config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = {"sliding_attention"} if zoo.FAMILIES[name].has_sliding else set()
    assert kinds == {"full_attention"} | sliding
    assert (getattr(config, "sliding_window", None) == zoo.WINDOW) == bool(sliding)


@pytest.mark.parametrize("name", MROPE)
def test_mrope_positions_are_three_dimensional(name):
    model, prompts = zoo.build(name), zoo.inputs(name, 40, batch=2)
    model(**prompts)
    # merged 2 x 3 advances the position by 3 over 6 columns, merged 1 x 6 by 6
    assert model.model.rope_deltas.flatten().tolist() == [-3, 0]


def test_left_pad_moves_every_column():
    prompts = zoo.inputs("mllama", 10, batch=2)
    padded = zoo.left_pad("mllama", prompts, 3)
    for key in ("input_ids", "attention_mask", "cross_attention_mask"):
        assert padded[key].shape[1] == 13
        assert padded[key][:, 3:].equal(prompts[key]) and not padded[key][:, :3].any()
    assert padded["pixel_values"] is prompts["pixel_values"]


def test_a_prompt_shorter_than_its_image_is_refused():
    assert zoo.inputs("llava", 13)["input_ids"].eq(zoo.IMAGE).sum() == 9
    with pytest.raises(ValueError, match="a llava prompt takes at least 13 columns, not 12"):
        zoo.inputs("llava", 12)
