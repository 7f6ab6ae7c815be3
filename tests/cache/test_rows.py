"""Caches whose rows are in int8: the oracle with each row as it is stored, and whatever a cache can do."""

import copy
import pickle

import pytest
import torch
from support import oracle, zoo
from support.configs import options_for

import mixkv
from mixkv import registry
from mixkv.ops.row_codes import dequantised, quantised

STEPS = 4
SMALL = dict(budget=14, window=6, kernel_size=3, pyramid_beta=4, rows="int8")
METHODS = [name for name, method in registry.METHODS.items() if not method.keeps_chunks]
# A number that lies between two codes may be rounded to the other one where a sum is taken in another order: one element of one
# row then differs by a 127th of the row's largest. The compiled operations round queries to 16 bits as well.
TOLERANCE = {"torch": 1e-3, "native": 1e-2}


def stored(rows):
    return dequantised(*quantised(rows))


def lengths_for(name):
    least = zoo.FAMILIES[name].min_length
    return [least + 34, least + 21]


def check_oracle(name, attn, method, **options):
    model = zoo.build(name, attn)
    prompts = zoo.inputs(name, lengths_for(name)[0], batch=2)
    columns = prompts["input_ids"].shape[1]
    cache = mixkv.MixKVCache(model, **options_for(method, model), **(SMALL | options))
    tokens, logits = oracle.generate(model, prompts, STEPS, past_key_values=cache)
    masks = oracle.keep_masks(cache, columns, batch=2)
    mixkv.unpatch(model)
    with oracle.masked(model, masks, columns, stored=stored):
        stored_tokens, stored_logits = oracle.generate(model, prompts, STEPS)
    assert (logits - stored_logits).abs().max() <= TOLERANCE[
        next(layer.store.backend for layer in cache.layers if hasattr(layer, "store"))
    ]
    assert torch.equal(tokens, stored_tokens)
    return model, prompts, cache, logits


@pytest.mark.parametrize("name, attn", zoo.cases())
def test_decode_equals_full_cache_of_stored_rows(name, attn):
    check_oracle(name, attn, "global")


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, backend):
    model, prompts, _, logits = check_oracle("llama", "sdpa", method, backend=backend)
    full = mixkv.MixKVCache(model, **options_for(method, model), **(SMALL | {"rows": "full"}))
    _, others = oracle.generate(model, prompts, STEPS, past_key_values=full)
    assert 1e-6 < (logits - others).abs().mean() < 0.01, "int8 is near the rows themselves, and not the same"


def test_selections_do_not_depend_on_the_format():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40, batch=2)
    caches = [mixkv.MixKVCache(model, **(SMALL | {"rows": rows})) for rows in ("int8", "full")]
    for cache in caches:
        oracle.generate(model, prompts, 1, past_key_values=cache)
    for layer in range(len(caches[0].layers)):
        for row, other in zip(caches[0].kept(layer), caches[1].kept(layer)):
            assert all(torch.equal(*pair) for pair in zip(row, other))


def test_bytes_of_every_buffer():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    cache = mixkv.MixKVCache(model, **SMALL)
    oracle.generate(model, prompts, STEPS, past_key_values=cache)
    numbers = cache.stats()
    allocated = numbers["rows"] + numbers["spare_rows"]
    heads, size, _ = cache.layers[0].shape
    bookkeeping = sum(2 * 4 * layer.store.lengths.numel() + layer.statistics.nbytes for layer in cache.layers)
    assert numbers["bytes"] == allocated * (2 * size + 2 + 2 + 4) + bookkeeping


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_saved_or_copied_cache_goes_on_alike(tmp_path, name):
    model, prompts = zoo.build(name), zoo.inputs(name, 40, batch=2)
    cache = mixkv.MixKVCache(model, **SMALL)
    tokens, _ = oracle.generate(model, prompts, STEPS, past_key_values=cache)
    cache.save(tmp_path / "cache")
    others = [mixkv.MixKVCache.load(tmp_path / "cache", model), pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)]
    turn = {"input_ids": torch.cat([prompts["input_ids"], tokens, tokens[:, :3]], dim=1)}
    turn["attention_mask"] = torch.ones_like(turn["input_ids"])
    results = [oracle.generate(model, turn, STEPS, past_key_values=part)[1] for part in (cache, *others)]
    assert all(torch.equal(results[0], result) for result in results[1:])
    full = mixkv.MixKVCache(model, **(SMALL | {"rows": "full"}))
    oracle.generate(model, prompts, STEPS, past_key_values=full)
    full.save(tmp_path / "full")
    stored_layers = sum(hasattr(layer, "store") for layer in cache.layers)
    assert stored_layers and (tmp_path / "cache").stat().st_size < (tmp_path / "full").stat().st_size


def test_a_damaged_scale_is_found(tmp_path):
    import safetensors.torch

    from mixkv import checked_file

    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, **SMALL)
    oracle.generate(model, zoo.inputs("llama", 40), STEPS, past_key_values=cache)
    cache.save(tmp_path / "cache")
    header, tensors = checked_file.read(tmp_path / "cache", range(2, 3))
    assert safetensors.torch.load_file(tmp_path / "cache").keys() == tensors.keys()
    del tensors["0.key_scale"]
    checked_file.write(tmp_path / "cache", header, tensors)
    with pytest.raises(ValueError, match="damaged .layer 0"):
        mixkv.MixKVCache.load(tmp_path / "cache", model)


def test_a_turn_at_once_equals_token_by_token():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40, batch=2)
    cache = mixkv.MixKVCache(model, **SMALL)
    more = zoo.inputs("llama", 6, batch=2, seed=5)["input_ids"]
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        one = copy.deepcopy(cache)
        block = model(input_ids=more, past_key_values=cache).logits
        single = [model(input_ids=more[:, i : i + 1], past_key_values=one).logits for i in range(6)]
    assert (block - torch.cat(single, dim=1)).abs().max() <= TOLERANCE["native"]
    rows, others = cache.layers[0].store.held(), one.layers[0].store.held()
    assert (rows[0].int() - others[0].int()).abs().max() <= 1


def test_crop_takes_back_what_was_appended():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40, batch=2)
    cache = mixkv.MixKVCache(model, **SMALL)
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        before = [part.clone() for part in cache.layers[0].store.held()]
        model(input_ids=prompts["input_ids"][:, :5], past_key_values=cache)
        cache.crop(-5)
    assert all(torch.equal(*pair) for pair in zip(before, cache.layers[0].store.held(), strict=True))


def test_the_decode_budget_moves_codes():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40, batch=2)
    cache = mixkv.MixKVCache(model, **SMALL, decode_budget=16, decode_slack=4, method="snapkv")
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        known = {}
        for step in range(20):
            model(input_ids=prompts["input_ids"][:, step : step + 1], past_key_values=cache)
            store = cache.layers[0].store
            for (row, head), positions in (
                ((r, h), part) for r, heads in enumerate(store.positions()) for h, part in enumerate(heads)
            ):
                first = int(store.buffers.starts[row * store.heads + head])
                for offset, position in enumerate(positions.tolist()):
                    now = [part[first + offset] for part in (store.key, store.value, *store.buffers.rows[3:])]
                    before = known.setdefault((row, head, position), now)
                    assert all(torch.equal(*pair) for pair in zip(before, now))
    assert store.max_length <= 20


def test_beams_and_assisted_decoding():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    best = oracle.beams(model, prompts, mixkv.MixKVCache(model, **SMALL))
    alone = oracle.beams(model, prompts, mixkv.MixKVCache(model, **SMALL, backend="torch"))
    assert torch.equal(best.sequences, alone.sequences)
    greedy = model.generate(**prompts, max_new_tokens=12, do_sample=False, past_key_values=mixkv.MixKVCache(model, **SMALL))
    drafted = model.generate(
        **prompts,
        max_new_tokens=12,
        do_sample=False,
        past_key_values=mixkv.MixKVCache(model, **SMALL),
        prompt_lookup_num_tokens=3,
    )
    assert torch.equal(greedy, drafted)


def test_chunks_are_refused():
    with pytest.raises(ValueError, match="rows='int8' does not go with method='hybridkv'"):
        mixkv.MixKVConfig(method="hybridkv", rows="int8")


def test_an_unknown_format():
    with pytest.raises(ValueError, match="unknown rows='int3'; choose from full, int8"):
        mixkv.MixKVConfig(rows="int3")
