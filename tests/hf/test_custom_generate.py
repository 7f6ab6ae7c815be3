"""custom_generate/: `generate` compresses by what it finds in a folder, and the model stays as it was."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support import zoo
from transformers import GenerationConfig

import mixkv
from mixkv.hf.versions import cache_argument

FOLDER = Path(__file__).parents[2]
SMALL = dict(budget=14, window=6)


@pytest.fixture(autouse=True)
def own_modules_cache(monkeypatch, tmp_path):
    """transformers copies the code to a folder and imports it from there."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))


def generate(model, prompts, **options):
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True) | options
    return model.generate(**prompts, custom_generate=str(FOLDER), trust_remote_code=True, **options)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 16}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("method", ["global", "snapkv"])
def test_same_tokens_as_a_patched_model(method, options):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    found = generate(model, prompts, method=method, **SMALL, **options)
    with mixkv.patched(model, method=method, **SMALL):
        expected = model.generate(**prompts, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, expected.sequences)
    cache = found.past_key_values
    assert isinstance(cache, mixkv.MixKVCache) and cache.config.method == method
    assert cache.stats()["bytes"] == expected.past_key_values.stats()["bytes"] < cache.stats()["bytes_full"]


def test_the_model_is_as_it_was():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    attention, state = model.config._attn_implementation, set(model.__dict__)
    generate(model, prompts, return_dict_in_generate=False, **SMALL)
    assert model.config._attn_implementation == attention and set(model.__dict__) == state
    plain = model.generate(**prompts, max_new_tokens=2, return_dict_in_generate=True)
    assert not isinstance(plain.past_key_values, mixkv.MixKVCache)


def test_a_config_and_options_over_it():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    config = mixkv.MixKVConfig(method="adakv", **SMALL)
    for given in (config, config.to_dict()):
        cache = generate(model, prompts, mixkv_config=given, budget=20).past_key_values
        assert cache.config == config.replace(budget=20)
    with pytest.raises(ValueError, match="budget=4 must exceed window=6"):
        generate(model, prompts, mixkv_config=config, budget=4)


def test_a_cache_that_is_given_is_used():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    cache = mixkv.MixKVCache(model, **SMALL)
    assert generate(model, prompts, **cache_argument(cache), budget=20, window=6).past_key_values is cache


def test_a_model_loaded_from_such_a_folder(tmp_path):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (folder / "custom_generate").symlink_to(FOLDER / "custom_generate")
    loaded = type(model).from_pretrained(folder, trust_remote_code=True).eval()
    output = loaded.generate(**prompts, max_new_tokens=3, return_dict_in_generate=True, **SMALL)
    assert isinstance(output.past_key_values, mixkv.MixKVCache)


def test_no_option_has_the_name_of_an_argument_of_generate():
    options = {field.name for field in dataclasses.fields(mixkv.MixKVConfig)}
    assert not options & set(GenerationConfig().to_dict())
