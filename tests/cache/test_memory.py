"""Compressing a layer takes little memory beside the layer's keys and values, which are there anyway."""

import pytest
import torch
from support.configs import measured_for
from support.stores import needs_library

from mixkv import MixKVConfig, registry
from mixkv.evaluation import memory
from mixkv.selection.select import allocate, rank
from mixkv.storage.chunks import ChunkStore
from mixkv.storage.ragged import RaggedStore

TOKENS, HEADS, GROUPS, SIZE = 16384, 1, 3, 64


def compress(query, key, value, config, factor):
    """What a layer does with a prompt: its stores, `RaggedStore` and perhaps `ChunkStore`."""
    ranking = rank(query, key, value, config, output_factor=factor, num_layers=2, measured=measured_for(config.score, key))
    method = registry.method(config.method)
    if method.plan is None:
        selection = ranking.take(allocate(config, ranking, 0, 2))
        return [RaggedStore.from_selection(key, value, selection, config.backend)]
    plan = method.plan(query, key, config, ranking)
    chunks = ChunkStore.from_plan(key, value, plan, config.backend)
    return [RaggedStore.from_selection(key, value, plan.ranking.take(plan.entries), config.backend), chunks]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize("method", registry.METHODS)
def test_extra_memory_is_less_than_a_quarter_of_the_layer(method, backend, dtype):
    query, key, value = (
        torch.randn(1, count, heads, SIZE).to(dtype).transpose(1, 2)
        for count, heads in ((32, HEADS * GROUPS), (TOKENS, HEADS), (TOKENS, HEADS))
    )
    profile = ((1.0,), (3.0,)) if registry.method(method).needs_profile else None
    for score in registry.SCORES:
        config = MixKVConfig(method=method, score=score, backend=backend, profile=profile)
        with memory.allocations() as allocated:
            stores = compress(query, key, value, config, torch.randn(HEADS, SIZE, SIZE).triu())
        extra = allocated.peak - sum(store.nbytes for store in stores if store is not None)
        assert 0 < extra < (key.nbytes + value.nbytes) / 4, score
