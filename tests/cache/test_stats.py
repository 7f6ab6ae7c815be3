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


KINDS = (
    "keys",
    "values",
    "scales",
    "positions",
    "bookkeeping",
    "spare",
    "bounds",
    "fetched",
    "prompt",
    "statistics",
    "other_layers",
)


def bytes_by_kind(cache):
    """`stats` by kind, which add up."""
    numbers = cache.stats()
    kinds = {kind: numbers[f"bytes_{kind}"] for kind in KINDS}
    assert sum(kinds.values()) == numbers["bytes"] and min(kinds.values()) >= 0
    return kinds


def size_of(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("rows, bits, recent_bits", [("full", 32, 32), ("int8", 8, 8), ("int4", 4, 8)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bytes_by_kind(family, rows, bits, recent_bits):
    """Of the rows' format, of layers with sliding windows, and after decode steps: each kind counted by itself."""
    model, prompts = zoo.build(family), zoo.inputs(family, 40, batch=2)
    cache = MixKVCache(model, **SMALL, rows=rows)
    assert set(bytes_by_kind(cache).values()) == {0}
    forward(model, cache, prompts)
    for _ in range(3):
        kinds, numbers = bytes_by_kind(cache), cache.stats()
        ours = [layer for layer in cache.layers if hasattr(layer, "store")]
        stock = [layer for layer in cache.layers if not hasattr(layer, "store")]
        assert bool(stock) == (family == "gemma3")
        size = ours[0].shape[1]
        held = numbers["rows"]
        recent = sum(layer.store.recent.total if rows == "int4" else 0 for layer in ours)
        assert kinds["keys"] == kinds["values"] == ((held - recent) * bits + recent * recent_bits) * size // 8
        assert kinds["scales"] == (0 if rows == "full" else 2 * 2 * held)
        assert kinds["positions"] == 4 * held
        stores = [
            part for layer in ours for part in ([layer.store.selected, layer.store.recent] if rows == "int4" else [layer.store])
        ]
        assert kinds["bookkeeping"] == size_of(*(part for store in stores for part in (store.buffers.starts, store.lengths)))
        row_bytes = [sum(part[:1].nbytes for part in store.buffers.rows) for store in stores]
        assert kinds["spare"] == sum(row * store.spare_rows for row, store in zip(row_bytes, stores))
        # transformers keeps views of larger tensors.
        assert kinds["other_layers"] == sum(
            part.untyped_storage().nbytes() for layer in stock for part in (layer.keys, layer.values)
        )
        assert kinds["statistics"] > 0 and kinds["prompt"] == kinds["bounds"] == kinds["fetched"] == 0
        forward(model, cache, {"input_ids": torch.full((2, 1), 7)})


@pytest.mark.parametrize("offload", [False, True])
def test_bytes_by_kind_of_chunks(offload):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 90)
    cache = MixKVCache(model, method="hybridkv", budget=70, window=6, hybrid_chunk=4, hybrid_threshold=1.0, offload=offload)
    forward(model, cache, prompts)
    kinds, layers = bytes_by_kind(cache), cache.layers
    chunks = [layer.chunks for layer in layers if layer.chunks is not None]
    assert chunks and kinds["bounds"] == size_of(*(part for store in chunks for part in (store.codes, store.grid)))
    rows = sum(layer.store.total for layer in layers)
    assert kinds["keys"] == rows * layers[0].shape[1] * 4 + size_of(*(store.pool.key for store in chunks))
    assert kinds["values"] == rows * layers[0].shape[2] * 4 + size_of(*(store.pool.value for store in chunks))
    assert kinds["positions"] == 4 * rows and kinds["scales"] == 0


def test_bytes_of_a_prompt_in_parts():
    """Before its end there are no rows; linear-attention states are of other layers."""
    model, prompts = LINEAR["lfm2"](), zoo.inputs("llama", 40)
    cache = MixKVCache(model, **SMALL)
    cache.expect_prompt(40)
    forward(model, cache, {"input_ids": prompts["input_ids"][:, :30]})
    kinds, ours = bytes_by_kind(cache), cache.layers[1]
    assert kinds["prompt"] == size_of(ours.prompt.key, ours.prompt.value) and kinds["keys"] == 0
    assert kinds["statistics"] == size_of(ours.window.query)
    forward(model, cache, {"input_ids": prompts["input_ids"][:, 30:]})
    kinds = bytes_by_kind(cache)
    states = [part for layer in (cache.layers[0], cache.layers[2]) for part in tensors_in(layer.conv_states)]
    assert kinds["prompt"] == 0 and kinds["keys"] == kinds["values"] > 0 and kinds["other_layers"] == size_of(*states)


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
