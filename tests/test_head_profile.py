"""Head profiles in safetensors: what they know of their model, and files that are refused. (JSON: test_errors.py.)"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import zoo

from mixkv import MixKVCache, MixKVConfig, head_profile


def test_profiles_of_other_models_are_refused(tmp_path):
    path = tmp_path / "profile.safetensors"
    head_profile.save(torch.rand(2, 4), path, "qwen2_vl", {"pages": 3})
    config = MixKVConfig(method="sparsemm", profile=path)
    assert config.profile.model == "qwen2_vl" and config == MixKVConfig(method="sparsemm", profile=head_profile.load(path))
    assert MixKVConfig.from_json(config.to_json()) == config
    MixKVCache(zoo.build("qwen2_vl"), config)
    with pytest.raises(ValueError, match="measured on a model of type 'qwen2_vl', and this one is 'llava'"):
        MixKVCache(zoo.build("llava"), config)
    MixKVCache(zoo.build("llava"), config.replace(profile=[list(row) for row in config.profile]))
    MixKVCache(zoo.build("llava"), config.replace(method="adakv"))


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "profile.safetensors"
    head_profile.save(torch.rand(2, 4), path, "llava")
    whole = path.read_bytes()
    for place in (3, 20, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(
            ValueError, match="profile.safetensors (is damaged|is a safetensors file, but no head profile|has format)"
        ):
            head_profile.load(path)
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="profile.safetensors is damaged, or no head profile that mixkv calibrate wrote"):
        MixKVConfig(profile=path)
    save_file({"scores": torch.rand(2, 4)}, path)
    with pytest.raises(ValueError, match="is a safetensors file, but no head profile that mixkv calibrate wrote"):
        head_profile.load(path)
    head_profile.save(torch.rand(2, 4), path, "llava", {"heads": 5})
    with pytest.raises(ValueError, match=r"its header says \[2, 5\] layers and heads, and it contains \[2, 4\]"):
        head_profile.load(path)
    assert set(load_file(path)) == {"scores"}
    (tmp_path / "profile.json").write_bytes(whole)
    with pytest.raises(ValueError, match="profile.json: it is not JSON .* ends in .safetensors"):
        head_profile.load(tmp_path / "profile.json")


def test_a_cache_is_no_profile_and_a_profile_no_cache(tmp_path):
    model, path = zoo.build("llava"), tmp_path / "one.safetensors"
    cache = MixKVCache(model, budget=16, window=6)
    model.generate(**zoo.inputs("llava", length=40), past_key_values=cache, max_new_tokens=2, do_sample=False)
    cache.save(path)
    with pytest.raises(ValueError, match="one.safetensors holds a cache, not a head profile"):
        head_profile.load(path)
    head_profile.save(torch.rand(2, 4), path)
    with pytest.raises(ValueError, match="one.safetensors holds a head profile, not a cache"):
        MixKVCache.load(path, model)
