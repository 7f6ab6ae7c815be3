"""Both names under which transformers takes a cache; a transformers newer than the tested one warns once."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from support import zoo

import mixkv
from mixkv.evaluation import measure
from mixkv.hf import versions

SMALL = dict(budget=14, window=6, kernel_size=3)
ROOT = Path(__file__).resolve().parents[2]
# transformers warns, and rightly, where a test gives the name that it is about to drop.
ignore_old_name = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def both_names():
    return pytest.mark.parametrize("name", ["cache", "past_key_values"])


def generate(model, prompts, **options):
    return model.generate(**prompts, max_new_tokens=6, do_sample=False, **options)


@both_names()
@ignore_old_name
@pytest.mark.parametrize("patched", [False, True], ids=["bound", "patched"])
@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 2}, {"prefill_chunk_size": 11}, {"prompt_lookup_num_tokens": 3}], ids=lambda mode: "-".join(mode)
)
def test_generate_takes_a_cache_under_both_names(name, patched, mode):
    prompts = zoo.inputs("llama", 48)
    prompts["input_ids"][:, -12:] = prompts["input_ids"][:, :12]
    plain = zoo.build("llama")
    with mixkv.patched(plain, **SMALL):
        expected = generate(plain, prompts, **mode)
    model = zoo.build("llama")
    if patched:
        mixkv.patch(model, budget=30, window=6)
    cache = mixkv.MixKVCache(model, **SMALL)
    assert torch.equal(generate(model, prompts, **{name: cache}, **mode), expected)
    assert cache.stats()["lengths"][0].float().mean() >= SMALL["budget"] and cache.get_seq_length() >= 48 + 5
    assert set(cache.stats()["lengths"][0].flatten().tolist()) != {cache.get_seq_length()}


@both_names()
@ignore_old_name
def test_another_cache_under_both_names_is_not_compressed(name):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    expected = generate(model, prompts)
    mixkv.patch(model, **SMALL)
    assert torch.equal(generate(model, prompts, **{name: transformers.DynamicCache()}), expected)


@ignore_old_name
def test_both_names_at_once():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    caches = [mixkv.MixKVCache(model, **SMALL) for _ in range(2)]
    if versions.CACHE_ARGUMENT == "cache":
        with pytest.warns(FutureWarning, match="Both `past_key_values` and `cache`"):
            generate(model, prompts, cache=caches[0], past_key_values=caches[1])
    else:
        with pytest.raises(ValueError, match="two names of one argument: leave one out"):
            generate(model, prompts, cache=caches[0], past_key_values=caches[1])


def test_forward_never_ignores_a_cache():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    cache = mixkv.MixKVCache(model, **SMALL)
    with torch.no_grad():
        if versions.CACHE_ARGUMENT == "cache":
            model(**prompts, cache=cache)
            assert cache.get_seq_length() == 40
        else:
            with pytest.raises(TypeError, match="calls the cache past_key_values: .* past_key_values=cache"):
                model(**prompts, cache=cache)


@pytest.mark.parametrize(
    "mode",
    [{}, {"num_beams": 2}, {"prefill_chunk_size": 11}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 2}],
    ids=lambda mode: "-".join(mode),
)
def test_a_patched_model_uses_the_present_name(mode):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    mixkv.patch(model, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        sampled = "num_return_sequences" in mode
        out = model.generate(**prompts, max_new_tokens=6, do_sample=sampled, return_dict_in_generate=True, **mode)
    assert isinstance(versions.returned_cache(out), mixkv.MixKVCache)


@pytest.mark.parametrize("config", [None, mixkv.MixKVConfig(**SMALL)], ids=["full", "compressed"])
def test_measuring_uses_the_present_name(config):
    model = zoo.build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        read = measure.read_prompt(model, zoo.inputs("llama", 40)["input_ids"], config)
        measure.step(model, read.cache, torch.tensor([5]))
    assert read.cache.get_seq_length() == 41


def test_a_newer_transformers_warns_once(monkeypatch):
    monkeypatch.setattr(versions.transformers, "__version__", "5.99.0")
    versions.warn_if_untested.cache_clear()
    with pytest.warns(UserWarning, match=f"up to {versions.NEWEST_TESTED}, and this is 5.99.0") as caught:
        mixkv.MixKVCache(zoo.build("llama"), **SMALL)
        mixkv.patch(zoo.build("llama"), **SMALL)
    assert len([warning for warning in caught if "was tested with" in str(warning.message)]) == 1
    versions.warn_if_untested.cache_clear()


def test_a_tested_transformers_does_not_warn(recwarn):
    versions.warn_if_untested.cache_clear()
    mixkv.MixKVCache(zoo.build("llama"), **SMALL)
    assert not [warning for warning in recwarn if "was tested with" in str(warning.message)]


def test_the_newest_tested_version_is_the_one_installed_by_default():
    pinned = re.search(r"^transformers==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned.group(1) == versions.NEWEST_TESTED
