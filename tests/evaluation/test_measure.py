"""Agreement and time of prompts and decode steps, on a tiny model."""

import math

import pytest
import torch

from mixkv import MixKVConfig
from mixkv.evaluation import measure


def test_kl_divergence_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert measure.kl_divergence(p.log() + 3, q.log() - 1).item() == pytest.approx(by_hand, abs=1e-6)
    assert measure.kl_divergence(p.log(), p.log()).item() == 0


def test_kl_divergence_computes_in_float32():
    logits = torch.tensor([[10.0, 1.0, 0.5]])
    assert measure.kl_divergence(logits.bfloat16(), logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("tokens", "expected"), [([1, 2, 3], 3), ([1, 2, 4], 2), ([5], 0), ([1, 2], 2), ([1, 2, 3, 4], 3), ([], 0)]
)
def test_equal_prefix(tokens, expected):
    assert measure.equal_prefix(tokens, [1, 2, 3]) == expected


def test_median_ratio_takes_ratios_within_turns():
    turns = [{"a": 2.0, "b": 1.0}, {"a": 30.0, "b": 10.0}, {"a": 4.0, "b": 4.0}]
    assert measure.median_ratio(turns, "a", "b") == 2.0


def test_greedy_is_what_generate_answers(model, ids):
    config = MixKVConfig(method="adakv", budget=48)
    for choice in (None, config):
        tokens = measure.greedy(model, measure.read_prompt(model, ids, choice), 12)
        cache = measure.read_prompt(model, ids[:, :1], choice).cache
        cache.reset()
        generated = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
        assert generated[0, ids.shape[1] :].tolist() == tokens


def test_greedy_stops_after_an_end_token(model, ids):
    tokens = measure.greedy(model, measure.read_prompt(model, ids, None), 8)
    model.generation_config.eos_token_id = [63, tokens[3]]
    assert measure.greedy(model, measure.read_prompt(model, ids, None), 8) == tokens[: tokens.index(tokens[3]) + 1]


def test_rounds_feed_every_cache_the_same_tokens(model, ids):
    caches = {name: measure.read_prompt(model, ids, None).cache for name in "ab"}
    whole = measure.read_prompt(model, ids, None).cache
    fed = torch.tensor([[3], [9], [4]])
    with torch.no_grad():
        expected = model(input_ids=fed.T, past_key_values=whole).logits[0]
    for turn, outcome in enumerate(measure.rounds(model, caches, fed)):
        for logits, seconds in outcome.values():
            torch.testing.assert_close(logits[0], expected[turn], atol=1e-5, rtol=1e-4)
            assert seconds > 0


def test_held_counts_rows_and_bytes(model, ids):
    full = measure.held(measure.read_prompt(model, ids, None).cache)
    length = ids.shape[1]
    assert (full.rows, full.rows_per_head, full.bytes) == (2 * 2 * length, length, 2 * 2 * length * 2 * 16 * 4)
    compressed = measure.held(measure.read_prompt(model, ids, MixKVConfig(budget=48)).cache)
    assert compressed.rows_per_head == 48
    assert compressed.bytes < full.bytes
