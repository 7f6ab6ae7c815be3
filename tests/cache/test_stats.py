"""What a cache says that it holds: bytes of every kind of layer, and a text that asks no device."""

import pytest
import torch
import transformers
from support import linear_models, zoo
from torch.utils._python_dispatch import TorchDispatchMode

from mixkv import MixKVCache

SMALL = dict(method="snapkv", budget=14, window=6)
LINEAR = {
    "lfm2": lambda: linear_models.lfm2("conv", "full_attention", "conv"),
    "granite": lambda: linear_models.granite("mamba", "attention", "mamba"),
}


def forward(model, cache, inputs):
    with torch.no_grad():
        return model(**inputs, past_key_values=cache).logits


def tensors_in(item):
    if torch.is_tensor(item):
        return [item]
    parts = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize("name", LINEAR)
def test_linear_attention_states_count(name):
    """In ``bytes`` and in ``bytes_full``, as all tensors that transformers' own layers hold."""
    model, prompts = LINEAR[name](), zoo.inputs("llama", 40)
    cache, full = MixKVCache(model, **SMALL), transformers.DynamicCache(config=model.config)
    assert cache.stats()["bytes"] == 0
    for part in (cache, full):
        forward(model, part, prompts)
    states = [
        sum(tensor.nbytes for kind in (layer.conv_states, layer.recurrent_states) for tensor in tensors_in(kind))
        for layer in (cache.layers[0], cache.layers[2])
    ]
    assert min(states) > 0
    numbers, ours = cache.stats(), cache.layers[1]
    assert numbers["bytes"] == ours.nbytes + sum(states)
    stock = full.layers[1].keys.nbytes + full.layers[1].values.nbytes
    assert numbers["bytes_full"] == stock + sum(states)


class NoOperations(TorchDispatchMode):
    """Within, no tensor is computed, copied or read."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_text_reads_no_tensor(family):
    model = zoo.build(family)
    cache = MixKVCache(model, **SMALL)
    forward(model, cache, zoo.inputs(family, 40))
    numbers = cache.stats()
    with NoOperations():
        text = repr(cache)
    assert "seen=40" in text and f"{numbers['bytes'] / 2**20:.2f} MiB of {numbers['bytes_full'] / 2**20:.2f} MiB" in text
    with NoOperations(), pytest.raises(AssertionError):
        cache.stats()
