"""Caches that mixkv 0.1.0 saved or pickled still load and give the same logits; its module names still import."""

import importlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import zoo

import mixkv
from mixkv import moved

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


@pytest.mark.parametrize("name", sorted(moved._MOVED))
def test_former_module_names_import(name):
    assert importlib.import_module(f"mixkv.{name}") is getattr(mixkv, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mixkv.nothing
