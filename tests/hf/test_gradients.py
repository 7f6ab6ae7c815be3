"""Gradients are those of a full cache, or refused: never silently wrong."""

import pytest
import torch
import transformers
from support import zoo

import mixkv
from mixkv.hf import versions

SMALL = dict(budget=14, window=6, kernel_size=3)


def gradients(model, cache, embeds, mask=None):
    """Gradients of a loss on all logits with respect to the inputs and to the parameters."""
    embeds = embeds.clone().requires_grad_()
    model.zero_grad()
    logits = model(inputs_embeds=embeds, attention_mask=mask, **versions.cache_argument(cache)).logits
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0))
    (logits @ weights)[:, -8:].sum().backward()
    return {"inputs": embeds.grad} | {
        name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None
    }


def embeddings(model, ids):
    return model.get_input_embeddings()(ids).detach()


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("name, attn", zoo.cases(vision=False))
def test_gradients_of_a_prompt_are_those_of_a_full_cache(name, attn, padded):
    model = zoo.build(name, attn)
    prompts = zoo.ragged(name, [40, 31])[0] if padded else zoo.inputs(name, 40, batch=2)
    embeds = embeddings(model, prompts["input_ids"])
    expected = gradients(model, transformers.DynamicCache(config=model.config), embeds, prompts["attention_mask"])
    cache = mixkv.MixKVCache(model, **SMALL)
    found = gradients(model, cache, embeds, prompts["attention_mask"])
    assert found.keys() == expected.keys() and expected["inputs"].abs().max() > 1e-3
    for key, gradient in expected.items():
        assert (found[key] - gradient).abs().max() <= 1e-4 * max(1.0, gradient.abs().max())
    assert not any(layer.store.key.requires_grad for layer in cache.layers if hasattr(layer, "store"))


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("name, attn", zoo.cases(vision=False))
def test_going_on_with_gradients_is_refused_and_loses_nothing(name, attn, new):
    model = zoo.build(name, attn)
    ids = zoo.inputs(name, 40 + new)["input_ids"]
    caches = [mixkv.MixKVCache(model, **SMALL) for _ in range(2)]
    for cache in caches:
        with torch.no_grad():
            model(ids[:, :40], **versions.cache_argument(cache))
    with pytest.raises(RuntimeError, match=r"gradients through a compressed cache would be wrong.*torch.no_grad\(\)"):
        model(ids[:, 40:], **versions.cache_argument(caches[0]))
    if zoo.FAMILIES[name].has_sliding:
        return  # the model's own sliding layers before ours have the tokens already
    assert caches[0].get_seq_length() == 40
    with torch.no_grad():
        logits = [model(ids[:, 40:], **versions.cache_argument(cache)).logits for cache in caches]
    assert torch.equal(*logits)


def test_frozen_models_go_on():
    model = zoo.build("llama").requires_grad_(False)
    ids = zoo.inputs("llama", 45)["input_ids"]
    cache = mixkv.MixKVCache(model, **SMALL)
    for part in (ids[:, :40], ids[:, 40:]):
        assert not model(part, **versions.cache_argument(cache)).logits.requires_grad
    assert cache.get_seq_length() == 45


def test_soft_prompts():
    """Embeddings that are trained with a frozen model: exact in front of all else, refused behind stored rows."""
    model = zoo.build("llama").requires_grad_(False)
    ids = zoo.inputs("llama", 40)["input_ids"]
    soft = torch.randn(1, 4, model.config.hidden_size, generator=torch.Generator().manual_seed(1)) / 4
    embeds = torch.cat([soft, embeddings(model, ids)], dim=1)
    expected = gradients(model, transformers.DynamicCache(config=model.config), embeds)["inputs"][:, :4]
    cache = mixkv.MixKVCache(model, **SMALL)
    found = gradients(model, cache, embeds)["inputs"][:, :4]
    assert (found - expected).abs().max() < 1e-4 and expected.abs().max() > 1e-3
    for count in (1, 4):
        with pytest.raises(RuntimeError, match="gradients through a compressed cache"):
            gradients(model, cache, soft[:, :count])
    assert cache.get_seq_length() == 44


def test_a_prompt_in_pieces_with_gradients_is_refused():
    model = zoo.build("llama")
    ids = zoo.inputs("llama", 40)["input_ids"]
    cache = mixkv.MixKVCache(model, **SMALL)
    cache.expect_prompt(40)
    with pytest.raises(RuntimeError, match="gradients through a compressed cache"):
        model(ids[:, :20], **versions.cache_argument(cache))


def test_training_mode_is_refused_with_gradients_only():
    model = zoo.build("llama").train()
    prompts = zoo.inputs("llama", 40)
    with pytest.raises(RuntimeError, match=r"training mode.*model.eval\(\)"):
        model(**prompts, **versions.cache_argument(mixkv.MixKVCache(model, **SMALL)))
    with torch.no_grad():
        model(**prompts, **versions.cache_argument(mixkv.MixKVCache(model, **SMALL)))
