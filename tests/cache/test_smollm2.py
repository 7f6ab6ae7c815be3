"""A real language model reading a real text: SmolLM2-135M-Instruct from its package."""

import copy
from pydoc_data.topics import topics

import pytest
import torch
from support import oracle

import mixkv
from mixkv.cache import gates
from mixkv.evaluation import loading, tasks
from mixkv.evaluation.measure import kl_divergence

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


def test_the_gate_that_is_shipped_serves_a_later_question(loaded, monkeypatch):
    """At the same budget the answer to a question that comes later is as with a full cache, as it is not by default."""
    monkeypatch.setattr(gates, "MAKERS", [])
    sample = tasks.TASKS["several"](loaded.tokenizer, 400, 1)
    context, fed = (torch.tensor([ids]) for ids in (sample.context, sample.follow[0]))
    wanted, divergence = None, []
    for options in ({"budget": 1000}, {"score": "gate", "budget": 80}, {"budget": 80}):
        cache = mixkv.MixKVCache(loaded.model, **options)
        with torch.no_grad():
            loaded.model(context, past_key_values=cache)
            logits = loaded.model(fed, past_key_values=cache).logits[:, -1]
        wanted = logits if wanted is None else wanted
        divergence.append(float(kl_divergence(wanted, logits)))
    assert divergence[1] < 0.5 * divergence[2]
