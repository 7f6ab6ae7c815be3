"""Later turns are compressed: a query sees exactly what had not been evicted before it."""

import pytest
import torch
import transformers
from support import oracle, zoo
from support.configs import options_for

import mixkv
from mixkv import registry

SMALL = dict(budget=14, window=6, kernel_size=3, pyramid_beta=4)
METHODS = [name for name, method in registry.METHODS.items() if method.turns]
LENGTH, TURN, STEPS = 48, 29, 4


def text(batch, length, seed=5):
    return torch.randint(zoo.TEXT.start, zoo.TEXT.stop, (batch, length), generator=torch.Generator().manual_seed(seed))


def after(prompts, answer, turn):
    """What `generate` is given for the next turn."""
    ids = torch.cat([prompts["input_ids"], answer, turn], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def conversation(model, prompts, turns, cache, times=None, **options):
    """Logits and tokens of a generation after ``prompts`` and after each of ``turns``."""
    found, prompt = [], prompts
    for turn in [None, *turns]:
        if turn is not None:
            prompt = after(prompt, found[-1][0], turn)
        found.append(oracle.generate(model, prompt, STEPS, past_key_values=cache, **options))
        if times is not None:
            times.note(prompt["input_ids"].shape[1])
    return found


def check_against_oracle(model, prompts, turns, cache, **options):
    times = oracle.EvictionTimes(cache, prompts["input_ids"].shape[0])
    found = conversation(model, prompts, turns, cache, times, **options)
    mixkv.unpatch(model)
    with oracle.masked_by_time(model, times.layers):
        expected = conversation(model, prompts, turns, transformers.DynamicCache(config=model.config))
    for (tokens, logits), (expected_tokens, expected_logits) in zip(found, expected):
        assert (logits - expected_logits).abs().max() <= 1e-4
        assert torch.equal(tokens, expected_tokens)
    return times.layers


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name, attn", zoo.cases())
def test_turns_equal_masked_full_cache(name, attn, method, turns):
    model = zoo.build(name, attn)
    cache = mixkv.MixKVCache(model, **options_for(method, model), turns=turns, **SMALL)
    layers = check_against_oracle(model, zoo.inputs(name, LENGTH, batch=2), [text(2, TURN)], cache)
    held = [lengths for lengths in cache.stats()["lengths"] if lengths is not None]
    mean = sum(lengths.float().mean() for lengths in held) / len(held)
    # The prompt's budget, its answer, then the turn with the last token of the answer; or all of them within one budget.
    assert mean == (2 * SMALL["budget"] + 2 * (STEPS - 1) if turns == "each" else SMALL["budget"] + STEPS - 1)
    evicted = [((part > LENGTH) & (part != oracle.NEVER)).sum() for part in layers if part is not None]
    assert sum(evicted) > 0
