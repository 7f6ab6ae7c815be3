"""compile=True: decode steps as one graph give the tokens of uncompiled ones, for every family, and compile once."""

import copy
import warnings

import pytest
import torch
from support import oracle, zoo
from support.stores import needs_library
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

import mixkv
from mixkv.cache.layer import MixKVLayer
from mixkv.hf.versions import CACHE_ARGUMENT, cache_argument
from mixkv.ops import build
from mixkv.storage.arena import ArenaStore

SMALL = dict(budget=24, window=8, kernel_size=3)
# Traces a step as a whole, or raises an error, and runs what it traced.
TRACED = CompileConfig(backend="eager", mode=None, fullgraph=True)
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

pytestmark = pytest.mark.skipif(
    CACHE_ARGUMENT != "cache", reason="the compiled call of generate is tested with the newest transformers"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def both(model, prompts, steps=12, compiled=TRACED, **options):
    """Caches after uncompiled and compiled generation, which give the same tokens and logits."""
    caches = mixkv.MixKVCache(model, **SMALL, **options), mixkv.MixKVCache(model, **SMALL, **options, compile=True)
    tokens, logits = oracle.generate(model, prompts, steps, cache=caches[0])
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        own_tokens, own_logits = oracle.generate(model, prompts, steps, cache=caches[1], compile_config=compiled or None)
    assert torch.equal(own_tokens, tokens)
    assert (own_logits - logits).abs().max() <= 1e-4
    stores = [layer.store for layer in caches[1].layers if isinstance(layer, MixKVLayer)]
    assert all(isinstance(store, ArenaStore) and store.in_arena for store in stores)
    return caches


def assert_same(cache, other):
    assert cache.get_seq_length() == other.get_seq_length()
    for layer in range(len(cache.layers)):
        kept, others = cache.kept(layer), other.kept(layer)
        if kept is not None:
            assert all(torch.equal(*pair) for row in zip(kept, others) for pair in zip(*row))
    mine, theirs = cache.stats(), other.stats()
    assert mine["rows"] == theirs["rows"] and mine["bytes_full"] == theirs["bytes_full"]


@pytest.mark.parametrize("name, attn", zoo.cases())
def test_steps_equal_uncompiled_ones(name, attn):
    """Not traced: the same operations, one by one; windows of sliding layers fill on the way."""
    model = zoo.build(name, attn)
    least = zoo.FAMILIES[name].min_length
    for length in (least + 2, least + 34):
        prompts = zoo.ragged(name, [length, max(length - 13, least)])[0]
        assert_same(*both(model, prompts, compiled=None))


@needs_library
@pytest.mark.parametrize("name, attn", zoo.cases())
def test_step_is_one_graph(name, attn):
    model = zoo.build(name, attn)
    least = zoo.FAMILIES[name].min_length
    for length in (least + 34, least + 50):
        caches = both(model, zoo.inputs(name, length, batch=2))
        assert_same(*caches)
        assert graphs() == 1
