"""MixKVConfig: JSON keeps all of it, and what is no config is refused by name."""

import json

import pytest
import torch
from support import zoo

import mixkv
from mixkv import MixKVCache, MixKVConfig, head_profile


def test_json_keeps_the_model_of_a_profile(tmp_path):
    head_profile.save(torch.rand(2, 4), tmp_path / "profile.safetensors", "qwen2_vl")
    config = MixKVConfig(method="sparsemm", profile=tmp_path / "profile.safetensors")
    for again in (MixKVConfig.from_json(config.to_json()), MixKVConfig.from_dict(config.to_dict()), config.replace(budget=64)):
        assert again.profile == config.profile and again.profile.model == "qwen2_vl"
    with pytest.raises(ValueError, match="measured on a model of type 'qwen2_vl', and this one is 'llava'"):
        MixKVCache(zoo.build("llava"), MixKVConfig.from_json(config.to_json()))


def test_json_of_a_profile_without_a_model_is_a_plain_table():
    config = MixKVConfig(method="sparsemm", profile=[[1.0, 2.0], [3.0, 4.0]])
    assert config.to_dict()["profile"] == [[1.0, 2.0], [3.0, 4.0]]
    assert MixKVConfig.from_json(config.to_json()).profile.model is None


def test_profile_files_in_json_keep_their_model(tmp_path):
    path, table = tmp_path / "profile.json", ((1.0, 2.0), (3.0, 4.0))
    head_profile.save(table, path, "llava")
    loaded = head_profile.load(path)
    assert loaded == table and loaded.model == "llava"
    head_profile.save(loaded, tmp_path / "again.json")
    assert head_profile.load(tmp_path / "again.json").model == "llava"
    path.write_text(json.dumps(table))
    assert head_profile.load(path) == table and head_profile.load(path).model is None
    for content in ({"scores": [[1.0]]}, {"model": 3, "scores": [[1.0]]}, {"model": "llava", "scores": [[1.0], []]}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="profile file .*profile.json: profile"):
            head_profile.load(path)


@pytest.mark.parametrize("given, remedy", [({"method": "global"}, "from_dict"), ("global", r"mixkv.MixKVConfig\(")])
def test_what_is_no_config_is_refused(given, remedy):
    model = zoo.build("llama")
    query, key = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    for use in (
        lambda: MixKVCache(model, given),
        lambda: MixKVCache(config=given, budget=64),
        lambda: mixkv.patch(model, given),
        lambda: mixkv.patched(model, given).__enter__(),
        lambda: mixkv.select(query, key, key, given),
    ):
        with pytest.raises(ValueError, match=f"config must be a MixKVConfig, not the {type(given).__name__} .*{remedy}"):
            use()
    with pytest.raises(ValueError, match=r"must be a dict of options, not \[1\]"):
        MixKVConfig.from_json("[1]")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(output_kernel_size=4), "output_kernel_size=4 must be odd"),
        (dict(layer_exponent=1.5), "layer_exponent=1.5 must be a number from 0 to 1"),
        (dict(sparsemm_floor=-0.1), "sparsemm_floor=-0.1 must be a number"),
        (dict(hybrid_first=-1), "hybrid_first=-1 must be"),
        (dict(hybrid_last=0), "hybrid_last=0 must be a positive int"),
        (dict(threshold=-0.1), "threshold=-0.1 must be a number of at least 0"),
        (dict(threshold=float("nan")), "threshold=nan must be a number"),
        (dict(threshold="half"), "threshold='half' must be a number"),
        (
            dict(budget="auto"),
            "budget='auto' does not go with score='mix-output', .* use another score .replay, replay-window, gate",
        ),
        (
            dict(budget="auto", score="gate", method="snapkv"),
            "budget='auto' does not go with method='snapkv', .* method .global",
        ),
        (dict(budget="auto", score="replay", method="hybridkv"), "budget='auto' does not go with method='hybridkv'"),
        (dict(budget="auto", score="replay", turns="all"), "budget='auto' is no bound, and turns='all' needs one"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MixKVConfig(**options)


# Constants of version 0.1.0 that are options now.
CONSTANTS = dict(output_kernel_size=9, sparsemm_floor=0.1, layer_exponent=2 / 3, hybrid_first=4, hybrid_last=8)


def test_a_config_without_newer_options_has_their_former_constants():
    config = MixKVConfig(method="adakv", budget=64)
    values = {name: value for name, value in config.to_dict().items() if name not in CONSTANTS}
    unpickled = object.__new__(MixKVConfig)
    unpickled.__setstate__({name: getattr(config, name) for name in values})
    for earlier in (MixKVConfig.from_dict(values), unpickled, unpickled.replace(budget=64)):
        assert earlier == config
        assert {name: getattr(earlier, name) for name in CONSTANTS} == CONSTANTS
    assert MixKVConfig.from_dict(unpickled.to_dict()) == config


def test_a_saved_cache_keeps_its_options(tmp_path):
    model = zoo.build("llama")
    options = dict(output_kernel_size=3, sparsemm_floor=0.5, layer_exponent=0.25, hybrid_first=1, hybrid_last=2)
    cache = MixKVCache(model, budget=14, window=6, **options)
    with torch.no_grad():
        model(**zoo.inputs("llama", 40), past_key_values=cache)
    cache.save(tmp_path / "cache")
    assert MixKVCache.load(tmp_path / "cache", model).config == cache.config
