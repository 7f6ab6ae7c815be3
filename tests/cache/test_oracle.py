"""Every family, attention and method: decoding on the compressed cache equals a full cache with evicted entries masked."""

import pytest
import torch
from support import oracle, zoo
from support.configs import options_for

import mixkv
from mixkv import registry

STEPS = 4
SMALL = dict(budget=14, window=6, kernel_size=3, pyramid_beta=4)


def lengths_for(name):
    least = zoo.FAMILIES[name].min_length
    return [least + 34, least + 21]


@pytest.mark.parametrize("method", registry.METHODS)
@pytest.mark.parametrize("name, attn", zoo.cases())
def test_decode_equals_masked_full_cache(name, attn, method):
    model = zoo.build(name, attn)
    prompts = zoo.inputs(name, lengths_for(name)[0], batch=2)
    columns = prompts["input_ids"].shape[1]
    cache = mixkv.MixKVCache(model, **options_for(method, model), **SMALL)
    tokens, logits = oracle.generate(model, prompts, STEPS, past_key_values=cache)

    masks = oracle.keep_masks(cache, columns, batch=2)
    ours = [mask for mask in masks if mask is not None]
    assert sum(mask.sum() for mask in ours) == sum(mask[:, :, 0].numel() * SMALL["budget"] for mask in ours)
    assert any(mask.sum() < mask.numel() for mask in ours)
    mixkv.unpatch(model)
    full_tokens, full_logits = oracle.generate(model, prompts, STEPS)
    assert torch.equal(logits[:, 0], full_logits[:, 0]), "the first token comes from an uncompressed prefill"
    with oracle.masked(model, masks, columns):
        masked_tokens, masked_logits = oracle.generate(model, prompts, STEPS)
    assert (logits - masked_logits).abs().max() <= 1e-4
    assert torch.equal(tokens, masked_tokens)
    assert (masked_logits - full_logits).abs().max() > 1e-3, "nothing that matters was evicted: the test shows nothing"


@pytest.mark.parametrize("name, attn", zoo.cases())
def test_padded_batch_equals_its_rows_alone(name, attn):
    model = zoo.build(name, attn)
    batch, rows = zoo.ragged(name, lengths_for(name))
    cache = mixkv.MixKVCache(model, **SMALL)
    tokens, logits = oracle.generate(model, batch, STEPS, past_key_values=cache)
    for index, prompt in enumerate(rows):
        alone = mixkv.MixKVCache(model, **SMALL)
        row_tokens, row_logits = oracle.generate(model, prompt, STEPS, past_key_values=alone)
        assert torch.equal(tokens[index], row_tokens[0])
        assert (logits[index] - row_logits[0]).abs().max() <= 1e-4
        pad = batch["input_ids"].shape[1] - prompt["input_ids"].shape[1]
        oracle.assert_keeps_as_alone(cache, index, alone, pad)


@pytest.mark.parametrize("name, attn", zoo.cases())
def test_budget_beyond_prompt_is_no_compression(name, attn):
    model = zoo.build(name, attn)
    prompts = zoo.inputs(name, lengths_for(name)[0])
    full_tokens, full_logits = oracle.generate(model, prompts, STEPS)
    tokens, logits = oracle.generate(model, prompts, STEPS, past_key_values=mixkv.MixKVCache(budget=1000))
    assert torch.equal(tokens, full_tokens)
    assert (logits - full_logits).abs().max() <= 1e-4
    mixkv.unpatch(model)
    again_tokens, again_logits = oracle.generate(model, prompts, STEPS)
    assert torch.equal(again_logits, full_logits)
