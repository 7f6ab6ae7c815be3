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
from mixkv.ops import step as decode_step
from mixkv.ops.arguments import FixedRoom, LogitOptions, RaggedBuffers
from mixkv.storage.arena import ArenaStore

SMALL = dict(budget=24, window=8, kernel_size=3)
# Traces a step as a whole, or raises an error, and runs what it traced.
TRACED = CompileConfig(backend="eager", mode=None, fullgraph=True)
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def both(model, prompts, steps=12, compiled=TRACED, generation=None, **options):
    """Caches after uncompiled and compiled generation, which give the same tokens and logits."""
    generation = generation or {}
    caches = mixkv.MixKVCache(model, **SMALL, **options), mixkv.MixKVCache(model, **SMALL, **options, compile=True)
    tokens, logits = oracle.generate(model, prompts, steps, **cache_argument(caches[0]), **generation)
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        own_tokens, own_logits = oracle.generate(
            model, prompts, steps, **cache_argument(caches[1]), compile_config=compiled or None, **generation
        )
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
@pytest.mark.parametrize(
    "name, attn", [("llama", "sdpa"), ("gemma3", "sdpa"), ("gpt_oss", "eager"), ("qwen2_vl", "sdpa"), ("mllama", "sdpa")]
)
def test_step_is_one_graph(name, attn):
    if name == "mllama" and CACHE_ARGUMENT != "cache":
        pytest.skip("transformers before 5.24 cannot trace it")
    model = zoo.build(name, attn)
    least = zoo.FAMILIES[name].min_length
    for length in (least + 34, least + 50):
        caches = both(model, zoo.inputs(name, length, batch=2))
        assert_same(*caches)
        assert graphs() == 1


class Calls(TorchDispatchMode):
    """Which operations are called, and how often."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


def decode_steps(model, cache, prompts, **options):
    """One generation of two steps to prepare; then a function that runs a step."""
    tokens = model.generate(**prompts, max_new_tokens=2, min_new_tokens=2, do_sample=False, **cache_argument(cache), **options)
    call = model.get_compiled_call(options.get("compile_config"))

    @torch.no_grad()
    def step(tokens):
        positions = torch.tensor([[cache.get_seq_length()]])
        return call(input_ids=tokens[:, -1:], position_ids=positions, return_dict=True, **cache_argument(cache)).logits

    return tokens, step


@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_library), "torch"])
def test_step_launches_one_operation_a_layer_and_waits_for_nothing(backend):
    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, **SMALL, backend=backend, compile=True)
    with torch.compiler.set_stance("force_eager"):
        tokens, step = decode_steps(model, cache, zoo.inputs("llama", 60))
        step(tokens)
        with Calls() as calls:
            step(tokens)
    ours = [name for name in calls.names if name.startswith("mixkv")]
    assert ours == [f"mixkv{'' if backend == 'native' else '_plain'}.step.default"] * len(cache.layers)
    waits = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal.default")
    assert not [name for name in calls.names if any(wait in name for wait in waits)]


def test_plain_step_launches(monkeypatch):
    """As on a GPU, where nothing is asked of the numbers and attention is one launch."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: query.clone())
    ints = [torch.zeros(count, dtype=torch.int32, device="meta") for count in (64, 2, 2, 2, 2)]
    query, key = (torch.empty(1, heads, 1, 16, device="meta") for heads in (4, 2))
    rows = torch.empty(64, 16, device="meta")
    arguments = (query, RaggedBuffers(rows, rows, *ints[:3]), FixedRoom(*ints[3:]), key, key, LogitOptions(0.25))
    decode_step.reference(*arguments, max_length=32)
    with Calls() as calls:
        decode_step.reference(*arguments, max_length=32)
    views = ("aten.view", "aten.expand", "aten.slice", "aten.select.", "aten.unsqueeze", "aten._unsafe_view", "aten.alias")
    assert len([name for name in calls.names if not name.startswith(views)]) == 21


def test_rows_move_when_there_is_no_room():
    """A sequence that outgrows its room gets twice as much, and the tokens stay the same."""
    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, **SMALL, compile=True)
    other = mixkv.MixKVCache(model, **SMALL)
    prompts = zoo.inputs("llama", 60)
    _, logits = oracle.generate(model, prompts, 402, **cache_argument(other))
    with torch.compiler.set_stance("force_eager"):
        tokens, step = decode_steps(model, cache, prompts)
        rooms = set()
        for expected in logits[0, 2:]:
            found = step(tokens)[:, -1]
            assert (found - expected).abs().max() <= 1e-4
            tokens = torch.cat([tokens, found.argmax(dim=-1, keepdim=True)], dim=1)
            rooms.add(cache.layers[0].store.key.shape[0])
    assert len(rooms) > 1
    assert_same(cache, other)


def go_on(cache, model, prompts, change):
    """Changes ``cache`` as ``change`` does and reads a turn of five tokens: kept positions, and logits of eight tokens."""
    change(cache)
    batch = cache.layers[1].batch
    seen = torch.full((batch, cache.get_seq_length()), 9)
    turn = {"input_ids": torch.cat([seen, torch.arange(5).expand(batch, -1) + 20], dim=1)}
    turn["attention_mask"] = torch.ones_like(turn["input_ids"])
    return oracle.generate(model, turn, 8, **cache_argument(cache))[1]


def crop(cache):
    cache.crop(-3)


def take(cache):
    cache.batch_select_indices(torch.tensor([1]))


def repeat(cache):
    cache.batch_repeat_interleave(2)


def nothing(cache):
    assert cache.stats()["rows"] > 0


@pytest.mark.parametrize("change", [nothing, crop, take, repeat])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_cache_afterwards_is_as_uncompiled(name, change, tmp_path):
    if name == "gemma3" and change is crop:
        pytest.skip("transformers cannot crop a full window")
    model = zoo.build(name)
    prompts = zoo.inputs(name, 60, batch=2)
    other, cache = both(model, prompts, compiled=None)
    copies = [copy.deepcopy(cache)]
    if change is nothing:
        cache.save(tmp_path / "a.mixkv")
        copies.append(mixkv.MixKVCache.load(tmp_path / "a.mixkv", model))
    expected = go_on(other, model, prompts, change)
    with torch.compiler.set_stance("force_eager"):
        for held in (*copies, cache):
            assert (go_on(held, model, prompts, change) - expected).abs().max() <= 1e-4
            assert_same(held, other)


@pytest.mark.parametrize("turns", ["first", "each", "all"])
def test_turns(turns):
    model = zoo.build("llama")
    other, cache = both(model, zoo.inputs("llama", 60, batch=2), compiled=None, turns=turns)
    with torch.compiler.set_stance("force_eager"):
        for length in (40, 23):
            logits = []
            for held in (other, cache):
                seen = torch.full((2, held.get_seq_length()), 9)
                new = torch.randint(4, 120, (2, length), generator=torch.Generator().manual_seed(length))
                ids = torch.cat([seen, new], dim=1)
                logits.append(
                    oracle.generate(model, dict(input_ids=ids, attention_mask=torch.ones_like(ids)), 8, **cache_argument(held))[
                        1
                    ]
                )
            assert (logits[0] - logits[1]).abs().max() <= 1e-4
            assert_same(cache, other)


def test_caches_of_one_model_do_not_meet():
    model = zoo.build("llama")
    prompts = [zoo.inputs("llama", length, seed=length) for length in (60, 75)]
    expected = [oracle.generate(model, prompt, 10, **cache_argument(mixkv.MixKVCache(model, **SMALL)))[1] for prompt in prompts]
    with torch.compiler.set_stance("force_eager"):
        caches, steps, tokens = [], [], []
        for prompt in prompts:
            caches.append(mixkv.MixKVCache(model, **SMALL, compile=True))
            first, step = decode_steps(model, caches[-1], prompt)
            tokens.append(first), steps.append(step)
        for index in range(2, 10):
            for cache in range(2):
                found = steps[cache](tokens[cache])[:, -1]
                assert (found - expected[cache][:, index]).abs().max() <= 1e-4
                tokens[cache] = torch.cat([tokens[cache], found.argmax(dim=-1, keepdim=True)], dim=1)
    assert caches[0].layers[0].store.key is not caches[1].layers[0].store.key
    rows = caches[0].layers[0].store.key
    del caches[0], steps[0], cache, step
    with torch.compiler.set_stance("force_eager"):
        again = mixkv.MixKVCache(model, **SMALL, compile=True)
        decode_steps(model, again, prompts[0])
    assert again.layers[0].store.key is rows


def test_exception_in_a_step_breaks_the_cache():
    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, **SMALL, compile=True)
    with torch.compiler.set_stance("force_eager"):
        tokens, step = decode_steps(model, cache, zoo.inputs("llama", 60))
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(tokens)
        handle.remove()
        with pytest.raises(RuntimeError, match="a compiled decode step was cut off"):
            step(tokens)


def test_sampling():
    model = zoo.build("llama")
    answers = []
    for compiled in (False, True):
        torch.manual_seed(3)
        with mixkv.patched(model, **SMALL, compile=compiled), torch.compiler.set_stance("force_eager"):
            answers.append(model.generate(**zoo.inputs("llama", 60, batch=2), max_new_tokens=20, do_sample=True))
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    "options, generation, what",
    [
        (dict(method="hybridkv"), {}, "hybridkv"),
        (dict(decode_budget=30), {}, "decode_budget=30"),
        (dict(rows="int4"), {}, "rows='int4'"),
        ({}, dict(num_beams=2), "beam search"),
        ({}, dict(prompt_lookup_num_tokens=3), "assisted decoding"),
    ],
)
def test_what_is_not_compiled_says_so_once(options, generation, what):
    model = zoo.build("llama")
    prompts, common = zoo.inputs("llama", 60), dict(max_new_tokens=12, do_sample=False)
    expected = model.generate(**prompts, **common, **generation, **cache_argument(mixkv.MixKVCache(model, **SMALL, **options)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = mixkv.MixKVCache(model, **SMALL, **options, compile=True)
        found = model.generate(**prompts, **common, **generation, **cache_argument(cache))
    messages = [str(warning.message) for warning in caught if "compile=True" in str(warning.message)]
    assert len(messages) == 1 and what in messages[0]
    assert torch.equal(found, expected) and graphs() == 0


@needs_library
@pytest.mark.parametrize("masked", [False, True])
def test_steps_without_generate_are_one_graph(masked):
    model = zoo.build("llama")
    prompts = zoo.inputs("llama", 60)
    expected = oracle.generate(model, prompts, 8, **cache_argument(mixkv.MixKVCache(model, **SMALL)))[1]
    cache = mixkv.MixKVCache(model, **SMALL, compile=True)
    step = model.get_compiled_call(TRACED)
    with torch.no_grad():
        logits = step(**prompts, **cache_argument(cache)).logits[:, -1:]
        for index in range(8):
            assert (logits[:, -1] - expected[:, index]).abs().max() <= 1e-4
            mask = dict(attention_mask=torch.ones(1, 61 + index, dtype=torch.long)) if masked else {}
            logits = step(input_ids=logits.argmax(dim=-1), **mask, **cache_argument(cache)).logits
    assert graphs() == 1


def test_prompt_in_chunks():
    model = zoo.build("llama")
    both(model, zoo.inputs("llama", 60), compiled=None, generation=dict(prefill_chunk_size=25))


@needs_library
@needs_compiler
def test_nothing_compiles_anew():
    """With inductor, five prompts of different lengths and 200 steps each are one graph, and nothing breaks."""
    model = zoo.build("llama", num_hidden_layers=2)
    options = CompileConfig(mode="default", fullgraph=True)
    for length in (60, 61, 90, 140, 75):
        tokens, _ = oracle.generate(model, zoo.inputs("llama", length), 201, **cache_argument(mixkv.MixKVCache(model, **SMALL)))
        with mixkv.patched(model, **SMALL, compile=True):
            found, _ = oracle.generate(model, zoo.inputs("llama", length), 201, compile_config=options)
        assert torch.equal(found, tokens)
    counters = torch._dynamo.utils.counters
    assert graphs() == 1 and not counters["graph_break"] and not counters["recompiles"]


@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_library), "torch"])
@pytest.mark.parametrize("rows", ["full", "int8"])
def test_row_formats(rows, backend):
    model = zoo.build("llama")
    for length in (60, 75, 52):
        # The same tensors for each prompt, with other rows in them.
        assert_same(*both(model, zoo.inputs("llama", length, batch=2, seed=length), compiled=None, rows=rows, backend=backend))
