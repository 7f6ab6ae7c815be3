"""mixkv.read: a context is read and compressed once, and serves any number of questions."""

import copy
import importlib
import pickle

import pytest
import torch
import transformers
from support import oracle, zoo

import mixkv
from mixkv.hf.versions import cache_argument
from mixkv.read import default_config

SMALL = dict(budget=20, window=6, replay_chunk=24)
STEPS = 4


def questions(name, prompts, count=2, length=5):
    """Inputs of `generate` with the context and a question after it."""
    for number in range(count):
        follow = zoo.inputs(name, length, prompts["input_ids"].shape[0], seed=number + 1, images=False)
        ids = torch.cat([prompts["input_ids"], follow["input_ids"]], dim=1)
        yield {"input_ids": ids, "attention_mask": torch.nn.functional.pad(prompts["attention_mask"], (0, length), value=1)}


def answers(model, name, prompts, cache):
    return [oracle.generate(model, asked, STEPS, **cache_argument(copy.deepcopy(cache))) for asked in questions(name, prompts)]


@pytest.mark.parametrize("name", ["llama", "gemma3", "llava"])
def test_questions_after_a_context_are_answered_as_by_a_masked_full_cache(name):
    model = zoo.build(name, "sdpa")
    prompts, _ = zoo.ragged(name, [zoo.FAMILIES[name].min_length + length for length in (40, 29)])
    context = prompts["input_ids"].shape[1]
    cache = mixkv.read(model, **prompts, **SMALL, refit=False)
    assert cache.get_seq_length() == context and cache.config.score == "replay" and cache.config.method == "global"
    found = answers(model, name, prompts, cache)
    masks = oracle.keep_masks(cache, context, batch=2)
    mixkv.unpatch(model)
    for asked, (tokens, logits) in zip(questions(name, prompts), found, strict=True):
        plain = fill(model, prompts)
        with oracle.masked(model, masks, context):
            masked_tokens, masked_logits = oracle.generate(model, asked, STEPS, **cache_argument(plain))
        assert torch.equal(tokens, masked_tokens)
        assert (logits - masked_logits).abs().max() <= 1e-4


def fill(model, prompts):
    """transformers' own cache of the prompts."""
    cache = transformers.DynamicCache(config=model.config)
    model.generate(**prompts, max_new_tokens=1, do_sample=False, **cache_argument(cache))
    return cache


def test_reading_is_what_generate_does_with_the_prompt_alone():
    model = zoo.build("llama", "sdpa")
    prompts, _ = zoo.ragged("llama", [60, 47])
    cache = mixkv.MixKVCache(model, score="replay", **SMALL)
    oracle.generate(model, prompts, 1, **cache_argument(cache))
    for mine, theirs in zip(mixkv.read(model, **prompts, **SMALL).kept(1), cache.kept(1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    config = mixkv.MixKVConfig(method="snapkv", score="attn", budget=20, window=6)
    assert mixkv.read(model, **prompts, config=config, budget=30).config == config.replace(budget=30)
    mine = mixkv.MixKVCache(model, config)
    assert mixkv.read(model, **prompts, cache=mine) is mine and mine.stats()["seen"] == 60
    unbound = mixkv.read(model, **prompts, cache=mixkv.MixKVCache(score="replay", **SMALL))
    assert torch.equal(unbound.kept(1)[0][0], cache.kept(1)[0][0])


@pytest.mark.parametrize(("name", "refit"), [("llama", True), ("llava", False)])
def test_values_are_refitted_for_texts(name, refit):
    model = zoo.build(name, "sdpa")
    prompts = zoo.inputs(name, zoo.FAMILIES[name].min_length + 40)
    config = mixkv.read(model, **prompts, budget=30).config
    assert config == default_config(images=not refit).replace(budget=30) and config.refit == refit


def test_embeddings_are_read_as_the_tokens_are():
    model = zoo.build("llama", "sdpa")
    ids = zoo.inputs("llama", 60)["input_ids"]
    embedded = mixkv.read(model, inputs_embeds=model.get_input_embeddings()(ids), **SMALL)
    assert all(torch.equal(*pair) for pair in zip(mixkv.read(model, input_ids=ids, **SMALL).kept(0)[0], embedded.kept(0)[0]))


def test_a_long_text_is_read_in_several_forwards_with_a_progress_bar(monkeypatch, capsys):
    model = zoo.build("llama", "sdpa")
    prompts, _ = zoo.ragged("llama", [120, 101])
    whole = mixkv.read(model, **prompts, **SMALL, progress=False)
    assert "reading" not in capsys.readouterr().err
    module = importlib.import_module("mixkv.read")
    monkeypatch.setattr(module, "_LONG", 100)
    monkeypatch.setattr(module, "_FORWARD", 50)
    sizes = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    parts = mixkv.read(model, **prompts, **SMALL)
    handle.remove()
    assert sizes[:3] == [50, 50, 20] and len(sizes) == 3 + 5
    assert "8/8" in capsys.readouterr().err
    for mine, theirs in zip(parts.kept(2), whole.kept(2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_what_was_read_is_saved_pickled_and_described(tmp_path):
    model = zoo.build("gemma3", "sdpa")
    prompts = zoo.inputs("gemma3", 60)
    cache = mixkv.read(model, **prompts, **SMALL)
    before = answers(model, "gemma3", prompts, cache)
    cache.save(tmp_path / "cache")
    copies = [mixkv.MixKVCache.load(tmp_path / "cache", model), pickle.loads(pickle.dumps(cache))]
    for other in copies:
        assert other.stats()["score"] == "replay" and "score='replay'" in repr(other)
        for (tokens, logits), (mine, my_logits) in zip(answers(model, "gemma3", prompts, other), before, strict=True):
            assert torch.equal(tokens, mine) and torch.equal(logits, my_logits)


def test_what_cannot_be_read():
    model = zoo.build("llama", "sdpa")
    ids = zoo.inputs("llama", 40)["input_ids"]
    with pytest.raises(ValueError, match="no context"):
        mixkv.read(model, budget=20)
    with pytest.raises(ValueError, match="a cache and options"):
        mixkv.read(model, input_ids=ids, cache=mixkv.MixKVCache(model), budget=20)
    cache = mixkv.read(model, input_ids=ids, **SMALL)
    with pytest.raises(ValueError, match="has read 40 tokens"):
        mixkv.read(model, input_ids=ids, cache=cache)
    with pytest.raises(ValueError, match="score='replay'"):
        mixkv.MixKVConfig(score="replay", decode_budget=64)
    with pytest.raises(RuntimeError, match=r"mixkv\.read"):
        model.generate(input_ids=ids, max_new_tokens=1, **cache_argument(mixkv.MixKVCache(score="replay", **SMALL)))


def test_a_patched_model_replays_every_prompt():
    model = zoo.build("llama", "sdpa")
    prompts = zoo.inputs("llama", 60)
    cache = mixkv.MixKVCache(model, score="replay", **SMALL)
    expected = oracle.generate(model, prompts, STEPS, **cache_argument(cache))
    with mixkv.patched(model, score="replay", **SMALL):
        for _ in range(2):
            assert torch.equal(oracle.generate(model, prompts, STEPS)[1], expected[1])
    assert not model.get_decoder()._forward_hooks


@pytest.mark.parametrize("lookup", [2, 5])
def test_drafts_wait_for_the_replay(lookup):
    model = zoo.build("llama", "sdpa")
    ids = zoo.inputs("llama", 30)["input_ids"].repeat(1, 2)
    cache, other = (mixkv.MixKVCache(model, score="replay", **SMALL) for _ in range(2))
    plain = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, **cache_argument(cache))
    drafted = model.generate(
        input_ids=ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=lookup, **cache_argument(other)
    )
    assert torch.equal(plain, drafted)
