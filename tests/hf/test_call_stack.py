"""How long a prompt is: read off the frames of `generate`, given by the caller, or refused."""

import pytest
import torch
import transformers
from support import zoo

import mixkv
from mixkv.hf import call_stack, versions

SMALL = dict(budget=14, window=6, kernel_size=3)
UNKNOWN = r"its length is unknown in transformers \S+: call cache.expect_prompt\(length\)"
ASSISTED = dict(prompt_lookup_num_tokens=3)
CHUNKED = dict(prefill_chunk_size=11)
OTHER_PREFILL = """
def _prefill(self, prompt_ids, generation_config, *args, **kwargs):
    input_ids = ids
    return prefill(self, prompt_ids, generation_config, *args, **kwargs)
"""


def prompt():
    prompts = zoo.inputs("llama", 48)
    prompts["input_ids"][:, -12:] = prompts["input_ids"][:, :12]
    return prompts


def generate(model, cache, **options):
    return model.generate(**prompt(), max_new_tokens=6, do_sample=False, **versions.cache_argument(cache), **options)


def rename(monkeypatch, name, new):
    """Gives the frames of the method ``name`` of `generate` another name."""
    method = getattr(transformers.GenerationMixin, name)
    monkeypatch.setattr(method, "__code__", method.__code__.replace(co_name=new))


@pytest.fixture
def expected():
    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, **SMALL)
    return generate(model, cache), cache.stats()["lengths"]


def assert_same(tokens, cache, expected):
    assert torch.equal(tokens, expected[0])
    rows = [lengths.sum() for lengths in cache.stats()["lengths"]]
    assert rows == [lengths.sum() for lengths in expected[1]]


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "bare"])
@pytest.mark.parametrize("name, mode", [("_prefill", CHUNKED), ("_assisted_decoding", ASSISTED)], ids=["chunked", "assisted"])
def test_another_name_of_the_method_is_an_error(monkeypatch, expected, name, mode, bound):
    model = zoo.build("llama")
    rename(monkeypatch, name, f"{name}_anew")
    cache = mixkv.MixKVCache(model, **SMALL) if bound else mixkv.MixKVCache(**SMALL)
    with pytest.raises(RuntimeError, match=UNKNOWN):
        generate(model, cache, **mode)
    assert cache.get_seq_length() == 0
    # The same without chunks or drafts is known to come in one forward.
    assert_same(generate(model, cache), cache, expected)


@pytest.mark.parametrize("name, mode", [("_prefill", CHUNKED), ("_assisted_decoding", ASSISTED)], ids=["chunked", "assisted"])
def test_a_patched_model_fails_closed(monkeypatch, name, mode):
    model = mixkv.patch(zoo.build("llama"), **SMALL)
    rename(monkeypatch, name, f"{name}_anew")
    with pytest.raises(RuntimeError, match=UNKNOWN):
        model.generate(**prompt(), max_new_tokens=6, do_sample=False, **mode)


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "bare"])
@pytest.mark.parametrize("ids", [None, torch.zeros(1, 3, dtype=torch.long), torch.zeros(48)], ids=["none", "short", "flat"])
def test_another_meaning_of_the_ids_is_an_error(monkeypatch, ids, bound):
    """A frame of the right name whose variable is not the prompt."""
    model = zoo.build("llama")
    scope = {"__name__": "transformers.generation.utils", "ids": ids, "prefill": transformers.GenerationMixin._prefill}
    exec(OTHER_PREFILL, scope)
    rename(monkeypatch, "_prefill", "_prefill_anew")
    monkeypatch.setattr(transformers.GenerationMixin, "_prefill", scope["_prefill"])
    with pytest.raises(RuntimeError, match=UNKNOWN):
        generate(model, mixkv.MixKVCache(*[model] * bound, **SMALL), **CHUNKED)


@pytest.mark.parametrize("missing", ["options", "chunk size"])
def test_unknown_options_are_an_error(monkeypatch, missing):
    """Where neither the methods nor the options of `generate` are known, a prompt may come in any way."""
    model = zoo.build("llama")
    rename(monkeypatch, "_prefill", "_prefill_anew")
    if missing == "options":
        monkeypatch.setattr(call_stack, "_generation_config", lambda frame: None)
    else:
        monkeypatch.setattr(call_stack, "_generation_config", lambda frame: object())
    with pytest.raises(RuntimeError, match=UNKNOWN):
        generate(model, mixkv.MixKVCache(model, **SMALL))


@pytest.mark.parametrize("mode", [CHUNKED, {}], ids=["chunked", "whole"])
def test_a_prompt_that_is_expected_needs_no_frames(monkeypatch, expected, mode):
    model = zoo.build("llama")
    rename(monkeypatch, "_prefill", "_read_prompt")
    monkeypatch.setattr(call_stack, "prompt_plan", None)
    cache = mixkv.MixKVCache(model, **SMALL)
    cache.expect_prompt(48)
    assert_same(generate(model, cache, **mode), cache, expected)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "global"])
@pytest.mark.parametrize("size", [1, 7, 39, 40])
def test_a_prompt_read_in_pieces_of_ones_own(method, size):
    model = zoo.build("llama")
    ids = zoo.inputs("llama", 41)["input_ids"]
    whole, pieces = (mixkv.MixKVCache(model, method=method, **SMALL) for _ in range(2))
    pieces.expect_prompt(40)
    with torch.no_grad():
        model(ids[:, :40], **versions.cache_argument(whole))
        for part in ids[:, :40].split(size, dim=1):
            model(part, **versions.cache_argument(pieces))
        assert [whole.kept(layer)[0][0].tolist() for layer in range(3)] == [
            pieces.kept(layer)[0][0].tolist() for layer in range(3)
        ]
        logits = [model(ids[:, 40:], **versions.cache_argument(cache)).logits for cache in (whole, pieces)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_tokens_beyond_the_expected_prompt():
    """They see the compressed prompt, as in a forward of their own, where layers choose for themselves; else they are refused."""
    model = zoo.build("llama")
    ids = zoo.inputs("llama", 43)["input_ids"]
    caches = [mixkv.MixKVCache(model, method="snapkv", **SMALL) for _ in range(2)]
    caches[0].expect_prompt(40)
    with torch.no_grad():
        together = model(ids, **versions.cache_argument(caches[0])).logits[:, 40:]
        model(ids[:, :40], **versions.cache_argument(caches[1]))
        apart = model(ids[:, 40:], **versions.cache_argument(caches[1])).logits
    assert (together - apart).abs().max() < 1e-4
    cache = mixkv.MixKVCache(model, method="global", **SMALL)
    cache.expect_prompt(40)
    with torch.no_grad(), pytest.raises(RuntimeError, match="a prompt of 40 tokens came in one forward with 3 more"):
        model(ids, **versions.cache_argument(cache))
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("length", [0, -3, 2.5, True, None, "40"])
def test_a_length_that_is_none(length):
    with pytest.raises(ValueError, match="must be a positive int: the length of the prompt in tokens"):
        mixkv.MixKVCache().expect_prompt(length)


def test_a_prompt_expected_too_late():
    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, **SMALL)
    with torch.no_grad():
        model(**zoo.inputs("llama", 40), **versions.cache_argument(cache))
    with pytest.raises(RuntimeError, match="came after 40 tokens had been read"):
        cache.expect_prompt(10)
    cache.reset()
    cache.expect_prompt(10)
    cache.reset()
    with torch.no_grad():
        model(**zoo.inputs("llama", 40), **versions.cache_argument(cache))
    assert cache.stats()["rows"] == 14 * 2 * 3


@pytest.mark.parametrize("method", ["snapkv", "global"])
def test_drafts_are_left_to_generate(method):
    """No tensor of `generate` is written to: what its candidate generator proposed is what it compares."""
    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, method=method, **SMALL)
    greedy = generate(model, mixkv.MixKVCache(model, method=method, **SMALL))
    lengths, forward = [], model.model.forward

    def watch(*args, **kwargs):
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        assert (ids >= 0).all()
        lengths.append(ids.shape[1])
        return forward(*args, **kwargs)

    model.model.forward = watch
    assert torch.equal(generate(model, cache, **ASSISTED), greedy)
    # Layers that share rows choose before the first draft is read.
    assert lengths[0] == 48 if method == "global" else lengths[0] > 48
