"""Layers of one model in several places: masks that arrive as copies, weights that are offloaded."""

import pytest
import torch
from support import zoo

import mixkv
from mixkv.cache import state
from mixkv.hf import attention

SMALL = dict(budget=14, window=6)


def generate(model, prompts, **options):
    cache = mixkv.MixKVCache(model, **SMALL, **options)
    return model.generate(**prompts, past_key_values=cache, max_new_tokens=5, do_sample=False), cache


def same_rows(first, second):
    return all(
        torch.equal(mine, other)
        for layer in range(len(first.layers))
        for rows, others in zip(first.kept(layer), second.kept(layer), strict=True)
        for mine, other in zip(rows, others, strict=True)
    )


def test_masks_are_read_once_a_prompt_or_turn_though_each_layer_has_its_own_copy(monkeypatch):
    """As under device_map, where every layer's inputs are moved to its device; each reading waits for the device."""
    model = zoo.build("llama", "eager")
    prompts = zoo.ragged("llama", [44, 31])[0]
    tokens, expected = generate(model, prompts)
    read = []
    monkeypatch.setattr(state, "visible", lambda mask: read.append(mask) or attention.visible(mask))
    copied = []

    def copy_mask(module, args, kwargs):
        copied.append(kwargs["attention_mask"])
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].clone()}

    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(copy_mask, with_kwargs=True)
    again, cache = generate(model, prompts)
    assert torch.equal(again, tokens) and same_rows(cache, expected)
    # A decode step's one token is real: its mask is not read at all.
    assert len(copied) == 5 * len(cache.layers) and len(read) == 1
    more = torch.cat([again, prompts["input_ids"][:, -7:]], dim=1)
    mask = torch.cat([prompts["attention_mask"], torch.ones(2, 12, dtype=torch.long)], dim=1)
    model.generate(more, attention_mask=mask, past_key_values=cache, max_new_tokens=1)
    assert len(copied) == 6 * len(cache.layers) and len(read) == 2


def test_drafts_as_long_as_the_prompt_have_valid_tokens_of_their_own():
    known = state.CacheState(mixkv.MixKVConfig())
    masks = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([[1, 1, 1], [1, 1, 1]])
    assert known.valid_tokens(masks[0], 0, 3).tolist() == masks[0].bool().tolist()
    assert known.valid_tokens(masks[1], 3, 3) is None
    assert known.valid_tokens(masks[0].clone(), 0, 3).tolist() == masks[0].bool().tolist()


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("method, score", [("adakv", "mix"), ("global", "mix-output"), ("global", "replay")])
def test_layers_dispatched_one_by_one(tmp_path, method, score, place):
    """accelerate's hooks hand every layer its inputs; the second layer's weights may lie in a file."""
    accelerate = pytest.importorskip("accelerate")
    prompts = zoo.ragged("llama", [44, 31])[0]
    tokens, expected = generate(zoo.build("llama"), prompts, method=method, score=score)
    model = zoo.build("llama")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": place if index == 1 else "cpu" for index in range(3)}
    model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    again, cache = generate(model, prompts, method=method, score=score)
    stats = cache.stats()
    assert stats["rows"] == expected.stats()["rows"]
    if score == "mix-output":
        # A projection in a file is not read for it: its layer's rows are weighed by their values' norms.
        assert stats["output_norm"] == ["projection", "value" if place == "disk" else "projection", "projection"]
    if score != "mix-output" or place == "cpu":
        assert torch.equal(again, tokens) and same_rows(cache, expected)
