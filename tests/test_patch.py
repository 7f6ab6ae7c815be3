"""patch, unpatch, patched; stats; peak memory."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from support import zoo

import mixkv

SMALL = dict(budget=14, window=6)


def implementations(model):
    return {name: module.config._attn_implementation for name, module in model.named_modules() if hasattr(module, "config")}


@pytest.mark.parametrize("name, attn", zoo.cases())
def test_unpatch_restores_everything(name, attn):
    model = zoo.build(name, attn)
    prompts = zoo.inputs(name, zoo.FAMILIES[name].min_length + 20)
    before, state = implementations(model), set(model.__dict__)
    with torch.no_grad():
        logits = model(**prompts).logits
        mixkv.patch(model, **SMALL)
        mixkv.patch(model, **SMALL)
        assert implementations(model) != before
        assert torch.equal(model(**prompts).logits, logits), "a patched model without our cache is the same model"
        model.generate(**prompts, max_new_tokens=3)
        mixkv.unpatch(model)
        assert implementations(model) == before and set(model.__dict__) == state
        assert torch.equal(model(**prompts).logits, logits)
    mixkv.unpatch(model)


def test_unpatch_undoes_what_a_cache_bound():
    model = zoo.build("llama")
    before = implementations(model)
    model.generate(**zoo.inputs("llama", 40), max_new_tokens=2, past_key_values=mixkv.MixKVCache(**SMALL))
    assert implementations(model) != before
    mixkv.unpatch(model)
    assert implementations(model) == before


def test_only_the_decoder_is_switched():
    model = zoo.build("llava")
    mixkv.patch(model)
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert model.get_decoder().config._attn_implementation == "mixkv_sdpa"


def test_patched_restores_the_former_patch():
    model = zoo.build("llama")
    prompts = zoo.inputs("llama", 40)
    mixkv.patch(model, **SMALL)
    outer = model.generate(**prompts, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    with mixkv.patched(model, budget=20, window=6):
        inner = model.generate(**prompts, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    after = model.generate(**prompts, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    assert (outer.config.budget, inner.config.budget, after.config.budget) == (14, 20, 14)
    with pytest.raises(ZeroDivisionError), mixkv.patched(zoo.build("llama")) as fresh:
        raise ZeroDivisionError
    assert set(implementations(fresh).values()) == {"sdpa"}


def test_a_copy_of_a_patched_model_is_patched_by_itself():
    model = zoo.build("llama")
    mixkv.patch(model, **SMALL)
    twin = copy.deepcopy(model)
    mixkv.unpatch(model)
    out = twin.generate(**zoo.inputs("llama", 40), max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, mixkv.MixKVCache)
    mixkv.unpatch(twin)
    assert set(implementations(twin).values()) == {"sdpa"}


def test_saved_models_know_nothing_of_it(tmp_path):
    model = zoo.build("llama")
    mixkv.patch(model)
    model.save_pretrained(tmp_path)
    assert "mixkv" not in (tmp_path / "config.json").read_text()


def test_stats():
    model = zoo.build("gemma3", "sdpa")
    prompts = zoo.inputs("gemma3", 60, batch=2)
    cache = mixkv.MixKVCache(model, **SMALL)
    assert cache.stats()["bytes"] == 0 and "not used" not in repr(cache)
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
    numbers = cache.stats()
    full = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompts, past_key_values=full)
    assert numbers["bytes_full"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    held = 0
    for layer in cache.layers:
        tensors = layer.store.buffers if hasattr(layer, "store") else (layer.keys, layer.values)
        held += sum(part.untyped_storage().nbytes() for part in tensors if isinstance(part, torch.Tensor))
        held += layer.statistics.nbytes if hasattr(layer, "store") else 0
    assert abs(numbers["bytes"] - held) <= 64 * len(cache.layers)
    assert numbers["ratio"] == numbers["bytes"] / numbers["bytes_full"] < 1
    assert numbers["seen"] == 60
    ours = [layer for layer in numbers["lengths"] if layer is not None]
    assert len(ours) == 1 and all(sum(row) == 14 * len(row) for layer in ours for row in layer)
    assert [layer.shape for layer in ours] == [(2, 2)]
    assert all((0 <= layer).all() and (layer <= 1).all() for layer in numbers["redundancy"] if layer is not None)
    assert numbers["rows"] == sum(sum(row) for layer in ours for row in layer)
    assert "MiB" in repr(cache) and "<svg" in cache._repr_html_()
    cache.reset()
    assert cache.stats()["bytes"] == 0 and cache.get_seq_length() == 0


def test_spare_capacity_stays_within_its_share():
    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, method="adakv", budget=128, window=32)
    with torch.no_grad():
        model(**zoo.inputs("llama", 1024), past_key_values=cache)
    assert cache.stats()["ratio"] <= 1.25 * 128 / 1024


def test_prefill_holds_one_layers_full_keys_at_a_time():
    """Of all prompts' key and value tensors seen by the layers, only the last layer's are alive when the forward ends."""
    import gc
    import weakref

    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, **SMALL)
    alive, most = [], 0
    update = cache.update

    def watch(key, value, layer_idx, *args, **kwargs):
        nonlocal most
        alive.append(weakref.ref(key))
        most = max(most, sum(ref() is not None for ref in alive))
        return update(key, value, layer_idx, *args, **kwargs)

    cache.update = watch
    with torch.no_grad():
        model(**zoo.inputs("llama", 200), past_key_values=cache)
    gc.collect()
    assert most == 1
    assert all(ref() is None for ref in alive)


def test_import_costs_nothing_beyond_torch_and_transformers():
    code = (
        "import sys, torch, transformers, transformers.generation, transformers.masking_utils, transformers.modeling_utils\n"
        "before = set(sys.modules)\nimport mixkv\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\nprint(sorted(new - {'mixkv'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    extra = [
        name for name in eval(result.stdout) if name not in sys.stdlib_module_names and name not in ("torch", "transformers")
    ]
    assert extra == []
