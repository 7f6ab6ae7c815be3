"""mixkv.calibrate and score="gate": fitted, kept, found, refused, and used in every way a cache is used."""

import copy
import importlib
import pickle

import pytest
import torch
from support import oracle, zoo

import mixkv
from mixkv import gate_file
from mixkv.cache import gates

SMALL = dict(budget=14, window=6)


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXKV_CACHE", str(tmp_path / "kept"))


def texts(name, count=6, length=60):
    return [zoo.inputs(name, length, seed=seed) for seed in range(count)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model and the path of its gate."""
    model = zoo.build("llama")
    return model, mixkv.calibrate(model, texts("llama"), out=tmp_path_factory.mktemp("gate") / "gate.safetensors")


def kept(model, score, prompts, **options):
    cache = mixkv.MixKVCache(model, score=score, **SMALL | options)
    model.generate(**prompts, max_new_tokens=1, past_key_values=cache)
    return [set(positions.tolist()) for layer in range(len(cache.layers)) for positions in cache.kept(layer)[0]]


def test_it_keeps_what_a_replay_keeps(llama):
    model, path = llama
    prompts = zoo.inputs("llama", 60, seed=50)
    options = dict(method="snapkv", budget=20)
    gate, replay, attention = (kept(model, score, prompts, **options, gate=str(path)) for score in ("gate", "replay", "attn"))
    common = [sum(len(one & other) for one, other in zip(replay, each)) for each in (gate, attention)]
    assert common[0] > 1.2 * common[1]


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "qwen2_vl", "qwen3_vl", "mllama"])
def test_decode_equals_masked_full_cache(name, tmp_path):
    model = zoo.build(name, zoo.FAMILIES[name].attn[-1])
    length = zoo.FAMILIES[name].min_length + 34
    path = mixkv.calibrate(model, texts(name, 3, length), out=tmp_path / "gate.safetensors")
    batch, rows = zoo.ragged(name, [length, length - 9], seed=20)
    cache = mixkv.MixKVCache(model, score="gate", gate=path, **SMALL)
    tokens, logits = oracle.generate(model, batch, 3, past_key_values=cache)
    masks = oracle.keep_masks(cache, length, batch=2)
    mixkv.unpatch(model)
    with oracle.masked(model, masks, length):
        _, expected = oracle.generate(model, batch, 3)
    assert (logits - expected).abs().max() <= 1e-4
    for index, prompt in enumerate(rows):
        alone = mixkv.MixKVCache(model, score="gate", gate=path, **SMALL)
        oracle.generate(model, prompt, 3, past_key_values=alone)
        oracle.assert_keeps_as_alone(cache, index, alone, length - prompt["input_ids"].shape[1])


@torch.no_grad()
def test_pieces_eviction_copies_and_files(llama, tmp_path):
    model, path = llama
    prompts = zoo.inputs("llama", 60, seed=30)
    options = dict(score="gate", gate=str(path), **SMALL, decode_budget=16, decode_slack=2)
    whole, pieces = mixkv.MixKVCache(model, **options), mixkv.MixKVCache(model, **options)
    model.generate(**prompts, max_new_tokens=1, past_key_values=whole)
    model.generate(**prompts, max_new_tokens=1, past_key_values=pieces, prefill_chunk_size=16)
    for layer in range(3):
        assert all(map(torch.equal, whole.kept(layer)[0], pieces.kept(layer)[0]))
    whole.save(tmp_path / "cache.mixkv")
    copies = [copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)), mixkv.MixKVCache.load(tmp_path / "cache.mixkv", model)]
    for token in range(25):
        fed = torch.tensor([[4 + token]])
        expected = model(input_ids=fed, past_key_values=whole).logits
        assert all(torch.equal(model(input_ids=fed, past_key_values=each).logits, expected) for each in copies)
    assert max(int(layer.store.lengths.max()) for layer in whole.layers) < 60


@torch.no_grad()
def test_later_turns_compete_by_the_gate(llama):
    model, path = llama
    cache = mixkv.MixKVCache(model, method="snapkv", score="gate", gate=str(path), budget=14, window=6, turns="all")
    first, second = (zoo.inputs("llama", length, seed=length)["input_ids"] for length in (60, 40))
    model.generate(input_ids=first, max_new_tokens=1, past_key_values=cache)
    model.generate(input_ids=torch.cat([first, second], dim=1), max_new_tokens=1, past_key_values=cache)
    assert all(len(head) == 14 for layer in range(3) for head in cache.kept(layer)[0])
    kept = {int(position) for layer in range(3) for head in cache.kept(layer)[0] for position in head}
    assert (
        {0, 1, 2, 3} <= kept and any(6 <= position < 54 for position in kept) and any(60 <= position < 94 for position in kept)
    )


def test_it_is_bound_to_the_weights(llama, tmp_path):
    model, path = llama
    for same in (copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).to(torch.float16)):
        mixkv.MixKVCache(same, score="gate", gate=path, **SMALL)
    for other in (zoo.build("llama", seed=1), zoo.build("mistral"), zoo.build("llama", num_hidden_layers=2)):
        with pytest.raises(ValueError, match="was fitted to another model .a llama of 3 compressed layers"):
            mixkv.MixKVCache(other, score="gate", gate=path, **SMALL)


def test_files_that_are_no_gates(llama, tmp_path):
    model, path = llama
    with pytest.raises(ValueError, match="does not exist: make one with mixkv.calibrate"):
        mixkv.MixKVCache(model, score="gate", gate=tmp_path / "none.safetensors", **SMALL)
    damaged = tmp_path / "damaged.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-3] ^= 255
    damaged.write_bytes(contents)
    with pytest.raises(ValueError, match="damaged"):
        mixkv.MixKVCache(model, score="gate", gate=str(damaged), **SMALL)
    with pytest.raises(ValueError, match="must be the path of a file that mixkv.calibrate wrote"):
        mixkv.MixKVConfig(score="gate", gate=3)


def test_it_is_fitted_at_first_use_and_kept(monkeypatch, capfd):
    model, again = zoo.build("llama", seed=2), zoo.build("llama", seed=2)
    read = []
    module = importlib.import_module("mixkv.calibrate")
    monkeypatch.setattr(module, "pieces", lambda *_: read.append(1) or texts("llama", 2))
    for each in (model, model, again):
        mixkv.MixKVCache(each, score="gate", **SMALL)
    assert len(read) == 1
    assert "fitting a gate to LlamaForCausalLM, once" in capfd.readouterr().err
    assert gates.kept_path(model).is_file()


def test_no_tokenizer_and_nothing_to_read():
    model = zoo.build("llama", seed=3)
    with pytest.raises(ValueError, match="no tokenizer is found for .*call mixkv.calibrate.model, tokenizer=...."):
        mixkv.MixKVCache(model, score="gate", **SMALL)
    with pytest.raises(ValueError, match="nothing to read"):
        mixkv.calibrate(model, [])


def test_shipped_gates_are_sound():
    names = sorted(file.stem for file in gates._SHIPPED.glob("*.safetensors"))
    assert names == ["SmolLM2-135M-Instruct", "document-vlm"]
    for name in names:
        gate = gate_file.load(gates._SHIPPED / f"{name}.safetensors")
        assert gate.probe and all(layer.weight.isfinite().all() for layer in gate.layers)
