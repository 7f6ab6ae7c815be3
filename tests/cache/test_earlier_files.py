"""Caches that mixkv 0.1.0 saved or pickled still load and give the same logits; its module names still import."""

import copy
import importlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import zoo

import mixkv
from mixkv import moved
from mixkv.ops import native

EARLIER = Path(__file__).parents[1] / "data" / "mixkv_0.1.0"
NAMES = ("global", "hybridkv", "bounded")


@pytest.fixture
def model():
    model = zoo.build("llama", "sdpa")
    model.load_state_dict(load_file(EARLIER / "llama.safetensors"))
    return model


@pytest.fixture(scope="module")
def expected():
    return load_file(EARLIER / "expected.safetensors")


def assert_goes_on(model, cache, expected, name):
    mixkv.MixKVCache(model)  # binds
    with torch.no_grad():
        logits = model(input_ids=expected["next"], past_key_values=cache).logits
    assert (logits - expected[f"{name}.logits"]).abs().max() <= 1e-4
    assert cache.stats()["seen"] == 46


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_cache_loads(model, expected, name):
    assert_goes_on(model, mixkv.MixKVCache.load(EARLIER / f"{name}.mixkv", model), expected, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_cache_loads(model, expected, name):
    assert_goes_on(model, pickle.loads((EARLIER / f"{name}.pickle").read_bytes()), expected, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_cache_loads_where_its_back_end_is_not(model, expected, name, monkeypatch):
    def chosen(cache):
        return {rows.backend for layer in cache.layers for rows in (layer.rows.resident, layer.rows.chunks) if rows is not None}

    pickled = (EARLIER / f"{name}.pickle").read_bytes()
    kept = pickle.loads(pickled)
    assert chosen(copy.deepcopy(kept)) == chosen(kept)
    with monkeypatch.context() as patch:
        patch.setattr(native, "status", lambda device="cpu", load=True: native.Status(False, reason="no compiler"))
        cache = pickle.loads(pickled)
        assert chosen(cache) == {"torch"}
        assert_goes_on(model, cache, expected, name)
        patch.setenv("MIXKV_BACKEND", "native")
        with pytest.raises(ValueError, match="backend='native' cannot be used: no compiler"):
            pickle.loads(pickled)
    # A copy made where both are stays with plain torch.
    assert chosen(copy.deepcopy(cache)) == chosen(pickle.loads(pickle.dumps(cache))) == {"torch"}


@pytest.mark.parametrize("name", sorted(moved._MOVED))
def test_former_module_names_import(name):
    assert importlib.import_module(f"mixkv.{name}") is getattr(mixkv, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mixkv.nothing
