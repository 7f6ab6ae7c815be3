"""Caches whose rows are in codes: the oracle with each row as it is stored, and whatever a cache can do."""

import copy
import pickle

import pytest
import torch
from support import oracle, zoo
from support.configs import options_for

import mixkv
from mixkv import registry
from mixkv.ops.row_codes import dequantised, packed, quantised, rotated, rotated_back

STEPS = 4
SMALL = dict(budget=14, window=6, kernel_size=3, pyramid_beta=4)
CODED = [name for name in registry.FORMATS if name != "full"]
METHODS = [name for name, method in registry.METHODS.items() if not method.keeps_chunks]
# A number that lies between two codes may be rounded to the other one where a sum is taken in another order: one element of one
# row then differs by a 127th of the row's largest. The compiled operations round queries to 16 bits as well.
TOLERANCE = {"torch": 1e-3, "native": 1e-2}


def stored_in(rows, columns):
    """From keys or values [B, Hkv, N, D] to what a cache has of them that read ``columns`` of them as a prompt."""
    if rows == "int8":
        return lambda part: dequantised(*quantised(part))

    def stored(part):
        part, selected = rotated(part.float()), columns - SMALL["window"]
        early, late = part[:, :, :selected], part[:, :, selected:]
        return rotated_back(torch.cat([dequantised(*packed(early)), dequantised(*quantised(late))], dim=2))

    return stored


def lengths_for(name):
    least = zoo.FAMILIES[name].min_length
    return [least + 34, least + 21]


def check_oracle(name, attn, method, rows, **options):
    model = zoo.build(name, attn)
    prompts = zoo.inputs(name, lengths_for(name)[0], batch=2)
    columns = prompts["input_ids"].shape[1]
    cache = mixkv.MixKVCache(model, **options_for(method, model), **(SMALL | options), rows=rows)
    tokens, logits = oracle.generate(model, prompts, STEPS, past_key_values=cache)
    masks = oracle.keep_masks(cache, columns, batch=2)
    mixkv.unpatch(model)
    with oracle.masked(model, masks, columns, stored=stored_in(rows, columns)):
        stored_tokens, stored_logits = oracle.generate(model, prompts, STEPS)
    assert (logits - stored_logits).abs().max() <= TOLERANCE[
        next(layer.store.backend for layer in cache.layers if hasattr(layer, "store"))
    ]
    assert torch.equal(tokens, stored_tokens)
    return model, prompts, cache, logits


@pytest.mark.parametrize("rows", CODED)
@pytest.mark.parametrize("name, attn", zoo.cases())
def test_decode_equals_full_cache_of_stored_rows(name, attn, rows):
    check_oracle(name, attn, "global", rows)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("rows", CODED)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, rows, backend):
    model, prompts, _, logits = check_oracle("llama", "sdpa", method, rows, backend=backend)
    full = mixkv.MixKVCache(model, **options_for(method, model), **SMALL)
    _, others = oracle.generate(model, prompts, STEPS, past_key_values=full)
    # Of the first step after the prompt: later ones may be fed other tokens.
    assert 1e-6 < (logits - others)[:, 1].abs().mean() < {"int8": 0.02, "int4": 0.2}[rows], (
        "codes are near the rows themselves, and not the same"
    )


def test_selections_do_not_depend_on_the_format():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40, batch=2)
    caches = [mixkv.MixKVCache(model, **SMALL, rows=rows) for rows in registry.FORMATS]
    for cache in caches:
        oracle.generate(model, prompts, 1, past_key_values=cache)
    for layer in range(len(caches[0].layers)):
        for cache in caches[1:]:
            for row, other in zip(caches[0].kept(layer), cache.kept(layer)):
                assert all(torch.equal(*pair) for pair in zip(row, other))


def test_bytes_of_every_buffer():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    cache = mixkv.MixKVCache(model, **SMALL, rows="int8")
    oracle.generate(model, prompts, STEPS, past_key_values=cache)
    numbers = cache.stats()
    allocated = numbers["rows"] + numbers["spare_rows"]
    heads, size, _ = cache.layers[0].shape
    bookkeeping = sum(2 * 4 * layer.store.lengths.numel() + layer.statistics.nbytes for layer in cache.layers)
    assert numbers["bytes"] == allocated * (2 * size + 2 + 2 + 4) + bookkeeping


def test_bytes_of_both_stores():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    cache = mixkv.MixKVCache(model, **SMALL, rows="int4")
    oracle.generate(model, prompts, STEPS, past_key_values=cache)
    heads, size, _ = cache.layers[0].shape
    for layer in cache.layers:
        rows = {"selected": 2 * (size // 2) + 2 + 2 + 4, "recent": 2 * size + 2 + 2 + 4}
        stores = {name: getattr(layer.store, name) for name in rows}
        allocated = sum((store.total + store.spare_rows) * rows[name] for name, store in stores.items())
        assert layer.nbytes == allocated + 2 * 2 * 4 * heads + layer.statistics.nbytes
        assert stores["recent"].total == heads * (SMALL["window"] + STEPS - 1)


@pytest.mark.parametrize("rows", CODED)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_saved_or_copied_cache_goes_on_alike(tmp_path, name, rows):
    model, prompts = zoo.build(name), zoo.inputs(name, 40, batch=2)
    cache = mixkv.MixKVCache(model, **SMALL, rows=rows)
    tokens, _ = oracle.generate(model, prompts, STEPS, past_key_values=cache)
    cache.save(tmp_path / "cache")
    others = [mixkv.MixKVCache.load(tmp_path / "cache", model), pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)]
    turn = {"input_ids": torch.cat([prompts["input_ids"], tokens, tokens[:, :3]], dim=1)}
    turn["attention_mask"] = torch.ones_like(turn["input_ids"])
    results = [oracle.generate(model, turn, STEPS, past_key_values=part)[1] for part in (cache, *others)]
    assert all(torch.equal(results[0], result) for result in results[1:])
    full = mixkv.MixKVCache(model, **SMALL)
    oracle.generate(model, prompts, STEPS, past_key_values=full)
    full.save(tmp_path / "full")
    stored_layers = sum(hasattr(layer, "store") for layer in cache.layers)
    assert stored_layers and (tmp_path / "cache").stat().st_size < (tmp_path / "full").stat().st_size


@pytest.mark.parametrize(
    "rows, missing", [("int8", "0.key_scale"), ("int4", "0.packed_value_scale"), ("int4", "0.packed_lengths")]
)
def test_a_missing_part_is_found(tmp_path, rows, missing):
    import safetensors.torch

    from mixkv import checked_file

    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, **SMALL, rows=rows)
    oracle.generate(model, zoo.inputs("llama", 40), STEPS, past_key_values=cache)
    cache.save(tmp_path / "cache")
    header, tensors = checked_file.read(tmp_path / "cache", range(2, 3))
    assert safetensors.torch.load_file(tmp_path / "cache").keys() == tensors.keys()
    del tensors[missing]
    checked_file.write(tmp_path / "cache", header, tensors)
    with pytest.raises(ValueError, match="damaged .layer 0"):
        mixkv.MixKVCache.load(tmp_path / "cache", model)


@pytest.mark.parametrize("rows", CODED)
def test_a_turn_at_once_equals_token_by_token(rows):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40, batch=2)
    cache = mixkv.MixKVCache(model, **SMALL, rows=rows)
    more = zoo.inputs("llama", 6, batch=2, seed=5)["input_ids"]
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        one = copy.deepcopy(cache)
        block = model(input_ids=more, past_key_values=cache).logits
        single = [model(input_ids=more[:, i : i + 1], past_key_values=one).logits for i in range(6)]
    assert (block - torch.cat(single, dim=1)).abs().max() <= TOLERANCE["native"]
    assert (cache.layers[0].store.key.int() - one.layers[0].store.key.int()).abs().max() <= 1


@pytest.mark.parametrize("rows", CODED)
def test_crop_takes_back_what_was_appended(rows):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40, batch=2)
    cache = mixkv.MixKVCache(model, **SMALL, rows=rows)
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        before = {name: part.clone() for name, part in cache.layers[0].store.state()[0].items()}
        model(input_ids=prompts["input_ids"][:, :5], past_key_values=cache)
        cache.crop(-5)
    after = cache.layers[0].store.state()[0]
    assert all(torch.equal(part, after[name]) for name, part in before.items())


@pytest.mark.parametrize("rows", CODED)
def test_the_decode_budget_moves_codes(rows):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40, batch=2)
    cache = mixkv.MixKVCache(model, **SMALL, decode_budget=16, decode_slack=4, method="snapkv", rows=rows)
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        known = {}
        for step in range(20):
            model(input_ids=prompts["input_ids"][:, step : step + 1], past_key_values=cache)
            whole = cache.layers[0].store
            assert all(part.diff().gt(0).all() for heads in whole.positions() for part in heads)
            for kind, store in enumerate((whole.selected, whole.recent) if rows == "int4" else (whole,)):
                check_codes(store, kind, known)
    assert whole.lengths.max() <= 20


def check_codes(store, kind, known):
    """Rows have the codes that they had before."""
    for row, heads in enumerate(store.positions()):
        for head, positions in enumerate(heads):
            first = int(store.buffers.starts[row * store.heads + head])
            for offset, position in enumerate(positions.tolist()):
                now = [part[first + offset].clone() for part in (store.key, store.value, *store.buffers.rows[3:])]
                before = known.setdefault((kind, row, head, position), now)
                assert all(torch.equal(*pair) for pair in zip(before, now))


@pytest.mark.parametrize("rows", CODED)
@pytest.mark.parametrize(
    "options", [{"turns": "each"}, {"turns": "all"}, {"refit": True}, {"turns": "each", "decode_budget": 20}], ids=str
)
def test_turns_and_refitted_values_keep_what_full_rows_keep(rows, options):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40, batch=2)
    caches = [mixkv.MixKVCache(model, **SMALL, **options, rows=name, method="snapkv", score="attn") for name in (rows, "full")]
    more = zoo.inputs("llama", 30, batch=2, seed=5)["input_ids"]
    with torch.no_grad():
        logits = []
        for cache in caches:
            model(**prompts, past_key_values=cache)
            model(input_ids=more, past_key_values=cache)
            logits.append(model(input_ids=more[:, :1], past_key_values=cache).logits)
    assert caches[0].stats()["rows"] == caches[1].stats()["rows"]
    assert all(part.diff().gt(0).all() for heads in caches[0].kept(0) for part in heads)
    # The first layer has seen the same: its window scores differ by the codes of earlier rows alone.
    same = [
        len(set(a.tolist()) & set(b.tolist())) / len(a)
        for row, other in zip(*(c.kept(0) for c in caches))
        for a, b in zip(row, other)
    ]
    assert min(same) > 0.6
    assert (logits[0] - logits[1]).abs().mean() < 0.5


@pytest.mark.parametrize("rows", CODED)
def test_beams_and_assisted_decoding(rows):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    options = SMALL | {"rows": rows}
    best = oracle.beams(model, prompts, mixkv.MixKVCache(model, **options))
    alone = oracle.beams(model, prompts, mixkv.MixKVCache(model, **options, backend="torch"))
    assert torch.equal(best.sequences, alone.sequences)
    greedy = model.generate(**prompts, max_new_tokens=12, do_sample=False, past_key_values=mixkv.MixKVCache(model, **options))
    drafted = model.generate(
        **prompts,
        max_new_tokens=12,
        do_sample=False,
        past_key_values=mixkv.MixKVCache(model, **options),
        prompt_lookup_num_tokens=3,
    )
    assert torch.equal(greedy, drafted)


def test_chunks_are_refused():
    with pytest.raises(ValueError, match="rows='int8' does not go with method='hybridkv'"):
        mixkv.MixKVConfig(method="hybridkv", rows="int8")


def test_an_unknown_format():
    with pytest.raises(ValueError, match="unknown rows='int3'; choose from full, int8, int4"):
        mixkv.MixKVConfig(rows="int3")
