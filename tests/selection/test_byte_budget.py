"""Budgets in bytes: what is stored takes as many as were allowed, and not a row more would fit."""

import pytest
import torch
from support import oracle, zoo
from support.configs import options_for

import mixkv
from mixkv import registry

SMALL = dict(window=6, kernel_size=3, pyramid_beta=4)


def row_bytes(cache, layer):
    heads, size, value_size = layer.shape
    return registry.row_format(cache.config.rows).row_bytes(size, value_size, 4) + 4


def held_bytes(cache, layers, index):
    """Of batch row ``index``, spare rows and bookkeeping left out."""
    total = 0
    for layer in layers:
        stores = (layer.store.selected, layer.store.recent) if cache.config.rows == "int4" else (layer.store,)
        total += sum(store.row_totals[index] * sum(part[:1].nbytes for part in store.buffers.rows) for store in stores)
    return total


def read(budget, *, lengths=(40,), method="global", rows="full", name="llama"):
    model = zoo.build(name)
    batch, _ = zoo.ragged(name, list(lengths))
    cache = mixkv.MixKVCache(model, **options_for(method, model), **SMALL, budget=budget, rows=rows)
    oracle.generate(model, batch, 1, past_key_values=cache)
    return cache, [layer for layer in cache.layers if hasattr(layer, "store")]


@pytest.mark.parametrize("rows", registry.FORMATS)
@pytest.mark.parametrize("method", [name for name, method in registry.METHODS.items() if not method.keeps_chunks])
def test_bytes_of_all_layers(method, rows):
    cache, layers = read("6KiB", method=method, rows=rows, lengths=(60, 48))
    row = row_bytes(cache, layers[0])
    heads = sum(layer.shape[0] for layer in layers)
    for index in range(2):
        held = held_bytes(cache, layers, index)
        assert 6 * 1024 - heads * row < held <= 6 * 1024
    assert layers[0].store.max_length > SMALL["window"]


@pytest.mark.parametrize("rows", registry.FORMATS)
def test_a_share_of_the_full_cache(rows):
    lengths = (60, 45)
    cache, layers = read("20%", rows=rows, lengths=lengths)
    row = row_bytes(cache, layers[0])
    heads = sum(layer.shape[0] for layer in layers)
    for index, length in enumerate(lengths):
        full = sum(layer.shape[0] * sum(layer.shape[1:]) * 4 * length for layer in layers)
        held = held_bytes(cache, layers, index)
        assert full / 5 - heads * row < held <= full / 5


def test_a_prompt_within_its_bytes_is_kept_whole():
    cache, layers = read("1GiB")
    assert all(layer.store.lengths.eq(40).all() for layer in layers)


def test_too_few_bytes_for_the_window():
    with pytest.raises(
        ValueError, match="budget='100B' is 100 bytes for each prompt, and the last 6 tokens, which are always kept, take"
    ):
        read("100B")


def test_text_that_is_no_number_of_bytes():
    for text in ("64", "64MB", "-1MiB", "0%", "101%", "many", "0B"):
        with pytest.raises(ValueError, match="is no number of bytes"):
            mixkv.MixKVConfig(budget=text)
    config = mixkv.MixKVConfig(budget="1.5 MiB")
    assert mixkv.MixKVConfig.from_json(config.to_json()) == config


def test_select_of_one_layer():
    query, key = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 50, 16)
    selection = mixkv.select(query, key, key, mixkv.MixKVConfig(method="snapkv", budget="2640B", window=6))
    assert selection.lengths.tolist() == [[10, 10]]
