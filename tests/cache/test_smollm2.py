"""A real language model reading a real text: SmolLM2-135M-Instruct from its package."""

import copy
from pydoc_data.topics import topics

import pytest
import torch
from support import oracle

import mixkv
from mixkv.evaluation import loading

pytestmark = pytest.mark.usefixtures("needs_smollm2")
OPTIONS = dict(budget=48, window=16)


@pytest.fixture(scope="module")
def loaded():
    return loading.load(None, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prompt(loaded):
    return loaded.tokenizer(topics["execmodel"], return_tensors="pt").input_ids[:, :400]


def inputs(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(autouse=True)
def unpatched(request):
    yield
    mixkv.unpatch(request.getfixturevalue("loaded").model)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "pyramidkv"])
def test_decode_equals_masked_full_cache(loaded, prompt, method):
    model = loaded.model
    cache = mixkv.MixKVCache(model, method=method, **OPTIONS)
    tokens, logits = oracle.generate(model, inputs(prompt), 5, past_key_values=cache)
    assert cache.stats()["ratio"] < 0.25
    mixkv.unpatch(model)
    _, full = oracle.generate(model, inputs(prompt), 5)
    assert torch.equal(logits[:, 0], full[:, 0])
    with oracle.masked(model, oracle.keep_masks(cache, prompt.shape[1], 1), prompt.shape[1]):
        masked_tokens, masked = oracle.generate(model, inputs(prompt), 5)
    assert torch.equal(tokens, masked_tokens)
    assert (logits - masked).abs().max() <= 1e-4
    assert (full - masked).abs().max() > 0.1


def test_drafts_chunks_and_copies_agree_with_greedy(loaded, prompt):
    model = loaded.model
    mixkv.patch(model, **OPTIONS)
    options = dict(max_new_tokens=12, do_sample=False)
    greedy = model.generate(**inputs(prompt), **options)
    assert torch.equal(model.generate(**inputs(prompt), **options, prompt_lookup_num_tokens=4), greedy)
    assert torch.equal(model.generate(**inputs(prompt), **options, prefill_chunk_size=96), greedy)
    cache = mixkv.MixKVCache(model, **OPTIONS)
    with torch.no_grad():
        model(**inputs(prompt[:, :-1]), past_key_values=cache)
    answers = [model.generate(**inputs(prompt), **options, past_key_values=copy.deepcopy(cache)) for _ in range(2)]
    assert torch.equal(*answers)


def test_half_precision_keeps_the_same_rows(loaded, prompt):
    """bfloat16 weights change the keys themselves; most kept rows stay, and decoding runs in bfloat16."""
    kept = []
    for model in (loaded.model, copy.deepcopy(loaded.model).to(torch.bfloat16)):
        cache = mixkv.MixKVCache(model, **OPTIONS)
        tokens, _ = oracle.generate(model, inputs(prompt), 4, past_key_values=cache)
        assert tokens.shape == (1, 4)
        kept.append([set(part.tolist()) for layer in range(len(cache.layers)) for part in cache.kept(layer)[0]])
    shared = sum(len(a & b) for a, b in zip(*kept))
    assert shared > 0.85 * sum(map(len, kept[0]))
