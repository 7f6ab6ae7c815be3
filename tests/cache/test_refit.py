"""refit=True: decoding equals a full cache with evicted entries masked and the values of the others refitted."""

import copy

import pytest
import torch
from support import oracle, zoo
from support.configs import options_for

import mixkv
from mixkv import registry
from mixkv.selection.refit import attention_output

STEPS = 3
SMALL = dict(budget=14, window=6, kernel_size=3, pyramid_beta=4)


def length_for(name):
    return zoo.FAMILIES[name].min_length + 34


def values(cache, layer):
    return cache.layers[layer].store.held()[1]


def check_against_oracle(model, name, **options):
    prompts = zoo.inputs(name, length_for(name), batch=2)
    columns = prompts["input_ids"].shape[1]
    plain = mixkv.MixKVCache(model, **SMALL, **options)
    _, plain_logits = oracle.generate(model, prompts, STEPS, past_key_values=plain)
    cache = mixkv.MixKVCache(model, **SMALL, **options, refit=True)
    tokens, logits = oracle.generate(model, prompts, STEPS, past_key_values=cache)
    masks = oracle.keep_masks(cache, columns, batch=2)
    mixkv.unpatch(model)
    with oracle.masked(model, masks, columns, refit_window=SMALL["window"]):
        expected_tokens, expected = oracle.generate(model, prompts, STEPS)
    assert (logits - expected).abs().max() <= 1e-4
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits[:, 0], plain_logits[:, 0]), "the first token comes from an uncompressed prefill"
    return (logits - plain_logits).abs().max()


@pytest.mark.parametrize("name, attn", zoo.cases())
def test_decode_equals_full_cache_with_refitted_values(name, attn):
    assert check_against_oracle(zoo.build(name, attn), name) > 1e-3, "no value changed: the test shows nothing"


@pytest.mark.parametrize("method", [name for name in registry.METHODS if name != "global"])
def test_every_method(method):
    model = zoo.build("llama")
    assert check_against_oracle(model, "llama", **options_for(method, model)) > 1e-3


@torch.no_grad()
def test_heads_with_chunks_keep_their_values():
    model = zoo.build("llama")
    prompts = zoo.inputs("llama", 200)
    options = dict(method="hybridkv", budget=60, window=8)
    pruned = mixkv.MixKVCache(model, **options)
    model(**prompts, past_key_values=pruned)
    threshold = float(torch.cat([part.flatten() for part in pruned.stats()["sparsity"]]).median()) + 1e-6
    caches = [mixkv.MixKVCache(model, **options, hybrid_threshold=threshold, refit=refit) for refit in (False, True)]
    for cache in caches:
        model(**prompts, past_key_values=cache)
    dynamic = torch.stack([layer.statistics.dynamic for layer in caches[0].layers])
    assert dynamic.any() and not dynamic.all()
    for layer, (plain, fitted) in enumerate(zip(*(cache.layers for cache in caches))):
        lengths = plain.store.lengths.tolist()
        parts = zip(values(caches[0], layer).split(lengths), values(caches[1], layer).split(lengths), dynamic[layer, 0])
        assert all(torch.equal(one, other) for one, other, kept in parts if kept)
    assert any(not torch.equal(values(caches[0], layer), values(caches[1], layer)) for layer in range(3))


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen2_vl"])
def test_padded_batch_equals_its_rows_alone(name):
    model = zoo.build(name, zoo.FAMILIES[name].attn[0])
    # The second prompt is shorter than its budget, and the third than the window.
    least = length_for(name)
    batch, rows = zoo.ragged(name, [least, least - 7] if zoo.FAMILIES[name].vision else [least, 10, 4])
    tokens, logits = oracle.generate(model, batch, STEPS, past_key_values=mixkv.MixKVCache(model, **SMALL, refit=True))
    for index, prompt in enumerate(rows):
        alone, row_logits = oracle.generate(model, prompt, STEPS, past_key_values=mixkv.MixKVCache(model, **SMALL, refit=True))
        assert torch.equal(tokens[index], alone[0])
        assert (logits[index] - row_logits[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_prompt_in_pieces_equals_one_forward(name):
    model = zoo.build(name, "eager")
    prompts = zoo.inputs(name, 40, batch=2)
    whole, pieces = (mixkv.MixKVCache(model, **SMALL, refit=True) for _ in range(2))
    oracle.generate(model, prompts, STEPS, past_key_values=whole)
    # The last piece has fewer tokens than the window.
    oracle.generate(model, prompts, STEPS, past_key_values=pieces, prefill_chunk_size=12)
    for layer in range(len(whole.layers)):
        if whole.kept(layer) is not None:
            assert (values(whole, layer) - values(pieces, layer)).abs().max() <= 1e-4


@torch.no_grad()
def test_a_prompt_within_its_budget_keeps_its_values_to_the_bit():
    model = zoo.build("llama")
    prompts = zoo.inputs("llama", 40, batch=2)
    plain, fitted = (mixkv.MixKVCache(model, budget=40, window=6, refit=refit) for refit in (False, True))
    for cache in (plain, fitted):
        model(**prompts, past_key_values=cache)
    assert all(torch.equal(values(plain, layer), values(fitted, layer)) for layer in range(3))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = zoo.build("llama").to(dtype)
    plain, fitted = (mixkv.MixKVCache(model, **SMALL, refit=refit) for refit in (False, True))
    for cache in (plain, fitted):
        model(**zoo.inputs("llama", 40), past_key_values=cache)
    assert all(values(fitted, layer).dtype == dtype and values(fitted, layer).isfinite().all() for layer in range(3))
    assert any(not torch.equal(values(plain, layer), values(fitted, layer)) for layer in range(3))


@torch.no_grad()
def test_saved_copied_and_evicted_while_decoding(tmp_path):
    model = zoo.build("llama")
    prompts = zoo.inputs("llama", 40)
    cache = mixkv.MixKVCache(model, **SMALL, refit=True, decode_budget=16, decode_slack=2)
    model(**prompts, past_key_values=cache)
    assert all(layer.pending_refit is None for layer in cache.layers)
    cache.save(tmp_path / "cache.mixkv")
    loaded, copied = mixkv.MixKVCache.load(tmp_path / "cache.mixkv", model), copy.deepcopy(cache)
    assert loaded.config.refit
    for token in range(20):
        fed = torch.tensor([[4 + token]])
        logits = [model(input_ids=fed, past_key_values=each).logits for each in (cache, loaded, copied)]
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert max(int(layer.store.lengths.max()) for layer in cache.layers) < 40


@torch.no_grad()
def test_replayed_queries_are_served_too():
    """After a replay, what tokens of the replay got from the whole prompt is nearer than without."""
    model = zoo.build("llama")
    prompts, found = zoo.inputs("llama", 60, batch=2), {}
    for refit in (False, True):
        cache = mixkv.MixKVCache(model, score="replay", **SMALL, refit=refit)
        kept = []
        for layer in cache.layers:
            layer.replay = record_queries(layer, kept)
        model.generate(**prompts, max_new_tokens=1, past_key_values=cache)
        found[refit] = [(layer.store.attend(query, layer.logits), output) for layer, (query, output) in zip(cache.layers, kept)]
    errors = {refit: [(one - other).square().sum() for one, other in pairs] for refit, pairs in found.items()}
    assert all(after < before for before, after in zip(errors[False], errors[True]))


def record_queries(layer, kept):
    """`layer.replay`, which appends the last token's query and its attention over the whole prompt to `kept`."""

    def replay(query, key, value, logits):
        asked = query[:, :, -1:].clone()
        kept.append((asked, attention_output(asked, layer.prompt.key, layer.prompt.value, None, logits, after=True)))
        return type(layer).replay(layer, query, key, value, logits)

    return replay


def test_padded_batch_after_a_replay_equals_its_rows_alone():
    model = zoo.build("llama")
    batch, rows = zoo.ragged("llama", [60, 47, 10])
    options = dict(score="replay", replay_chunk=16, refit=True, **SMALL)
    whole = mixkv.MixKVCache(model, **options)
    oracle.generate(model, batch, STEPS, past_key_values=whole)
    for index, prompt in enumerate(rows):
        alone = mixkv.MixKVCache(model, **options)
        oracle.generate(model, prompt, STEPS, past_key_values=alone)
        oracle.assert_keeps_as_alone(whole, index, alone, 60 - prompt["input_ids"].shape[1])
        for layer in range(3):
            mine = whole.layers[layer].store.lengths.view(3, 2).sum(1).tolist()
            assert (values(whole, layer).split(mine)[index] - values(alone, layer)).abs().max() <= 1e-3
