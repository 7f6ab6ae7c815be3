"""Binding is counted, leaves no trace where it is not known, and costs other caches nothing."""

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from support import oracle, zoo

import mixkv
from mixkv.hf import binding, versions

SMALL = dict(budget=14, window=6, kernel_size=3)
ROOT = Path(__file__).resolve().parents[2]

# Run in a process of its own: argv is "before" if mixkv is imported first, and the folder.
CHILD = """
import json, pickle, sys
from pathlib import Path
import torch, transformers

torch.set_num_threads(1)
if sys.argv[1] == "before":
    import mixkv
folder = Path(sys.argv[2])
inputs = torch.load(folder / "inputs.pt")
options = dict(max_new_tokens=5, do_sample=False)
found = {}

bound = torch.load(folder / "bound.pt", weights_only=False)
found["imported"] = "mixkv" in sys.modules
found["implementation"] = bound.config._attn_implementation
with torch.no_grad():
    found["forward"] = bound(**inputs).logits.sum().item()
found["bound"] = bound.generate(**inputs, **options).tolist()

patched = pickle.loads((folder / "patched.pickle").read_bytes())
out = patched.generate(**inputs, **options, return_dict_in_generate=True)
found["patched"] = out.sequences.tolist()
cache = getattr(out, "cache", None) if "cache" in out else out.past_key_values
found["kind"] = type(cache).__name__
found["budget"] = cache.config.budget

model, cache = pickle.loads((folder / "pair.pickle").read_bytes())
with torch.no_grad():
    found["step"] = model(torch.tensor([[7]]), **{sys.argv[3]: cache}).logits[0, -1].tolist()

import mixkv
mixkv.unpatch(patched)
found["unpatched"] = patched.generate(**inputs, **options).tolist()
print(json.dumps(found))
"""


def implementation(model):
    return model.get_decoder().config._attn_implementation


def greedy(model, prompts, **options):
    return model.generate(**prompts, max_new_tokens=5, do_sample=False, **options)


def use(model, cache, ids=((7,),)):
    with torch.no_grad():
        return model(torch.tensor(ids), **versions.cache_argument(cache)).logits


def filled(model, **options):
    cache = mixkv.MixKVCache(model, **{**SMALL, **options})
    with torch.no_grad():
        model(**zoo.inputs("llama", 40), **versions.cache_argument(cache))
    return cache


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    """A folder with a bound model, a patched one, and one with its cache; and what they give here."""
    folder, model, prompts = tmp_path_factory.mktemp("pickled"), zoo.build("llama"), zoo.inputs("llama", 40)
    expected = {"full": greedy(model, prompts).tolist()}
    with torch.no_grad():
        expected["forward"] = model(**prompts).logits.sum().item()
    cache = filled(model)
    torch.save(model, folder / "bound.pt")
    torch.save(dict(prompts), folder / "inputs.pt")
    (folder / "pair.pickle").write_bytes(pickle.dumps((model, cache)))
    expected["step"] = use(model, cache)[0, -1]
    mixkv.patch(model, **SMALL)
    expected["compressed"] = greedy(model, prompts).tolist()
    (folder / "patched.pickle").write_bytes(pickle.dumps(model))
    return folder, expected


@pytest.mark.parametrize("imported", ["never", "before"])
def test_a_pickled_model_works_in_another_process(pickled, imported):
    folder, expected = pickled
    done = subprocess.run(
        [sys.executable, "-c", CHILD, imported, str(folder), versions.CACHE_ARGUMENT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["imported"] == (imported == "before")
    assert found["implementation"] == "sdpa"
    assert abs(found["forward"] - expected["forward"]) < 1e-2
    assert found["bound"] == found["unpatched"] == expected["full"]
    assert found["patched"] == expected["compressed"] != expected["full"]
    assert (found["kind"], found["budget"]) == ("MixKVCache", 14)
    assert (torch.tensor(found["step"]) - expected["step"]).abs().max() < 1e-4


def test_a_pickled_model_knows_nothing_of_a_binding_here():
    model = zoo.build("llama")
    filled(model)
    for twin in (pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(mixkv.patch(model)))):
        assert type(twin.config._attn_implementation) is str and implementation(twin) == "sdpa"
    mixkv.unpatch(twin)
    assert set(twin.__dict__) == set(zoo.build("llama").__dict__)


def test_a_model_pickled_with_the_name_of_our_function():
    """As earlier versions pickled a bound one."""
    model = zoo.build("llama")
    model.config._attn_implementation_internal = "mixkv_eager"
    cache = mixkv.MixKVCache(model, **SMALL)
    use(model, cache, zoo.inputs("llama", 40)["input_ids"].tolist())
    assert cache.get_seq_length() == 40
    mixkv.unpatch(model)
    assert implementation(model) == "eager"


def test_a_copy_of_a_bound_model_stays_bound():
    model = zoo.build("llama")
    cache = filled(model)
    twin, own = copy.deepcopy((model, cache))
    mixkv.unpatch(model)
    expected = use(twin, own)
    assert torch.equal(use(mixkv.patch(model), cache), expected)


def test_an_unpickled_cache_binds_itself():
    model = zoo.build("llama")
    cache = filled(model)
    stored = pickle.dumps(cache)
    expected = use(model, cache)
    mixkv.unpatch(model)
    assert torch.equal(use(model, pickle.loads(stored)), expected)


def test_patched_leaves_caches_usable():
    model = zoo.build("llama")
    before = filled(model)
    expected = use(model, copy.deepcopy(before))
    with mixkv.patched(model, **SMALL):
        within = filled(model)
        generated = versions.returned_cache(greedy(model, zoo.inputs("llama", 40), return_dict_in_generate=True))
    assert "_prepare_cache_for_generation" not in model.__dict__
    for cache in (before, within):
        assert torch.equal(use(model, cache), expected)
    use(model, generated)
    mixkv.unpatch(model)
    assert implementation(model) == "sdpa"


def test_patched_leaves_a_copied_cache_usable():
    model = zoo.build("llama")
    with mixkv.patched(model, **SMALL):
        cache = copy.deepcopy(filled(model))
    gc.collect()
    use(model, cache)
    assert cache.get_seq_length() == 41


def test_patched_restores_the_model_when_no_cache_is_left():
    model = zoo.build("llama")
    state = set(model.__dict__)
    with mixkv.patched(model, **SMALL):
        greedy(model, zoo.inputs("llama", 40))
    gc.collect()
    with mixkv.patched(model, **SMALL):
        greedy(model, zoo.inputs("llama", 40))
    assert implementation(model) == "sdpa" and set(model.__dict__) == state


def two_of_one_config():
    model = zoo.build("llama")
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert model.get_decoder().config is other.get_decoder().config
    return model, other


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "cache"])
def test_unpatch_leaves_another_model_of_the_same_config(patched):
    model, other = two_of_one_config()
    prompts = zoo.inputs("llama", 40)
    if patched:
        mixkv.patch(other, **SMALL)
        expected = greedy(other, prompts)
    else:
        cache = filled(other)
        expected = use(other, copy.deepcopy(cache))
    mixkv.patch(model, **SMALL)
    mixkv.unpatch(model)
    assert "_prepare_cache_for_generation" not in model.__dict__
    assert implementation(other) == "mixkv_sdpa"
    if patched:
        assert torch.equal(greedy(other, prompts), expected)
        assert torch.equal(greedy(model, prompts), greedy(zoo.build("llama"), prompts))
    else:
        assert torch.equal(use(other, cache), expected)
    mixkv.unpatch(other)
    assert implementation(model) == implementation(other) == "sdpa"
    mixkv.unpatch(model)


def test_a_model_that_has_gone_holds_nothing():
    model, other = two_of_one_config()
    mixkv.patch(other, **SMALL)
    del other
    gc.collect()
    mixkv.patch(model)
    mixkv.unpatch(model)
    assert implementation(model) == "sdpa"


def test_binding_from_several_threads():
    model, other = two_of_one_config()
    mixkv.patch(other, **SMALL)
    errors = []

    def work():
        try:
            for _ in range(10):
                cache = filled(other)
                mixkv.unpatch(mixkv.patch(model))
                use(other, cache)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert implementation(other) == "mixkv_sdpa"
    mixkv.unpatch(other)
    assert implementation(model) == "sdpa"


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_bound_model_breaks_no_graph_of_other_caches(attn, kind):
    torch.compiler.reset()
    model = zoo.build("llama", attn)
    mixkv.patch(model, **SMALL)
    ids = zoo.inputs("llama", 20)["input_ids"]
    text = model.config.get_text_config()
    cache = (
        transformers.StaticCache(config=text, max_cache_len=24) if kind == "static" else transformers.DynamicCache(config=text)
    )
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        full = model(torch.cat([ids, ids[:, :1]], dim=1)).logits[0, -1]
        compiled(ids, **versions.cache_argument(cache))
        logits = compiled(ids[:, :1], **versions.cache_argument(cache)).logits[0, -1]
    torch.compiler.reset()
    assert (logits - full).abs().max() < 1e-4


def test_a_model_compiled_with_a_compressed_cache():
    """There the graph breaks at each layer; tokens stay the same."""
    torch.compiler.reset()
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    _, expected = oracle.generate(model, prompts, 5, **versions.cache_argument(mixkv.MixKVCache(model, **SMALL)))
    model.forward = torch.compile(model.forward, backend="eager")
    _, logits = oracle.generate(model, prompts, 5, **versions.cache_argument(mixkv.MixKVCache(model, **SMALL)))
    torch.compiler.reset()
    assert (logits - expected).abs().max() < 1e-4


def test_binding_is_cheap():
    """Making a cache does not walk other models."""
    model = zoo.build("llama")
    others = [mixkv.patch(zoo.build("llama")) for _ in range(3)]
    walked, walk = [], binding.attention_modules
    binding.attention_modules = lambda module: (walked.append(module), walk(module))[1]
    try:
        mixkv.MixKVCache(model, **SMALL)
    finally:
        binding.attention_modules = walk
    assert walked and not any(module in others for module in walked)


@pytest.mark.parametrize(
    "use", [lambda model: mixkv.patch(model), lambda model: mixkv.MixKVCache(model)], ids=["patch", "cache"]
)
def test_a_bound_model_is_freed_with_its_last_reference(use):
    """In a reference cycle it would stay in memory until the garbage collector runs."""

    def reference():
        model = zoo.build("llama")
        use(model)
        model.generate(**zoo.inputs("llama", 40), max_new_tokens=2)
        return weakref.ref(model)

    reference()  # what a process imports at the first generation may keep frames
    gc.collect()
    gc.disable()
    try:
        assert reference()() is None
    finally:
        gc.enable()
