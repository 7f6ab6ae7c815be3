"""Prompts that are read once and compressed by many configurations."""

import pytest
import torch
from support import oracle, zoo

import mixkv
from mixkv import MixKVConfig
from mixkv.evaluation import measure
from mixkv.evaluation.recording import Recording, joined


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("method, score", [("snapkv", "attn"), ("adakv", "mix"), ("global", "mix-output")])
def test_a_replayed_prompt_is_a_read_one(name, method, score):
    model = zoo.build(name, "sdpa")
    ids = zoo.inputs(name, zoo.FAMILIES[name].min_length + 40)["input_ids"][:1]
    config = MixKVConfig(method=method, score=score, budget=14, window=6)
    recording = Recording(model, ids)
    follow = ids[:, :5]
    for _ in range(2):
        replayed = recording.compressed(config)
        read = measure.read_prompt(model, ids, config).cache
        for layer in range(len(read.layers)):
            kept = read.kept(layer)
            assert kept is None or all(torch.equal(a, b) for a, b in zip(kept[0], replayed.kept(layer)[0], strict=True))
        torch.testing.assert_close(recording.follow(replayed, follow), recording.follow(read, follow), atol=1e-5, rtol=0)
    full = measure.read_prompt(model, ids, None).cache
    torch.testing.assert_close(
        recording.follow(recording.compressed(None), follow), recording.follow(full, follow), atol=1e-5, rtol=0
    )
    mixkv.unpatch(model)
    tokens, _ = oracle.generate(model, {"input_ids": torch.cat([ids, follow], 1)}, 6)
    assert torch.equal(recording.answer(follow, 6), tokens)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_caches_joined_into_a_batch_answer_as_each_does(name):
    model = zoo.build(name, "sdpa")
    ids = zoo.inputs(name, zoo.FAMILIES[name].min_length + 40)["input_ids"][:1]
    kinds = [("snapkv", "attn", 9), ("adakv", "mix", 14), ("global", "mix-output", 20), ("adakv", "mix", 30)]
    recording = Recording(model, ids)
    caches = [recording.compressed(MixKVConfig(method=m, score=s, budget=b, window=6)) for m, s, b in kinds]
    follow = ids[:, :5]
    batch = recording.follow(joined(caches), follow.expand(len(caches), -1))
    for index, cache in enumerate(caches):
        torch.testing.assert_close(batch[index : index + 1], recording.follow(cache, follow), atol=1e-5, rtol=0)


def test_caches_with_chunks_joined_into_a_batch_answer_as_each_does():
    model = zoo.build("llama", "sdpa")
    ids = zoo.inputs("llama", 150)["input_ids"][:1]
    recording = Recording(model, ids)
    options = dict(method="hybridkv", window=6)
    kinds = [dict(budget=40, hybrid_threshold=share) for share in (0.0, 0.035, 1.0)] + [dict(budget=80, hybrid_threshold=1.0)]
    caches = [recording.compressed(MixKVConfig(**options, **kind)) for kind in kinds]
    assert [sum(layer.chunks is not None for layer in cache.layers) > 0 for cache in caches] == [False, True, True, True]
    follow = ids[:, :5]
    batch = recording.follow(joined(caches), follow.expand(len(caches), -1))
    for index, cache in enumerate(caches):
        torch.testing.assert_close(batch[index : index + 1], recording.follow(cache, follow), atol=1e-5, rtol=0)
    other = recording.compressed(MixKVConfig(budget=80, hybrid_chunk=5, hybrid_threshold=1.0, **options))
    with pytest.raises(ValueError, match="hybrid_chunk"):
        joined([caches[2], other])


def test_a_known_ranking_serves_every_budget_and_no_other_score():
    model = zoo.build("llama", "sdpa")
    ids = zoo.inputs("llama", 90)["input_ids"][:1]
    recording = Recording(model, ids)
    for method, score, budget in [
        ("adakv", "mix", 9),
        ("adakv", "mix", 20),
        ("snapkv", "mix", 20),
        ("snapkv", "attn", 20),
        ("global", "mix", 20),
    ]:
        config = MixKVConfig(method=method, score=score, budget=budget, window=6)
        replayed, read = recording.compressed(config), measure.read_prompt(model, ids, config).cache
        for layer in range(len(read.layers)):
            for mine, theirs in zip(replayed.kept(layer)[0], read.kept(layer)[0], strict=True):
                assert torch.equal(mine, theirs)
