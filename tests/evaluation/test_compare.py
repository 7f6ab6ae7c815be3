"""The comparison of caches on one prompt, on a tiny model and on SmolLM2."""

import pytest
import torch
from support.text_models import make_tokenizer

from mixkv import MixKVConfig
from mixkv.evaluation import InputError, bench, compare, loading, measure, prompts


def test_a_whole_budget_agrees_to_the_token(model, tokenizer, ids):
    kept, cut = MixKVConfig(budget=400), MixKVConfig(budget=40)
    full, same, other = compare.run(model, tokenizer, ids, [kept, cut], max_new_tokens=12, steps=4)
    assert full["method"] == "full" and full["bytes_ratio"] == full["prefill_ratio"] == full["step_ratio"] == 1
    assert full["mean_kl"] == 0 and full["equal_tokens"] == full["reference_tokens"] == 12
    assert same["answer"] == full["answer"] and same["equal_tokens"] == 12
    assert same["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert other["mean_kl"] > 1e-6
    assert other["rows_per_head"] == 40 and other["bytes_ratio"] < 1


def test_compare_by_hand(model, tokenizer, ids):
    """The mean divergence is that of one block of the full cache's answer fed through each cache."""
    config = MixKVConfig(method="snapkv", score="attn", budget=40)
    _, record = compare.run(model, tokenizer, ids, [config], max_new_tokens=10, steps=20)
    reference = measure.greedy(model, measure.read_prompt(model, ids, None), 10)
    logits = []
    for choice in (None, config):
        cache = measure.read_prompt(model, ids, choice).cache
        with torch.no_grad():
            measure.bind(model, cache)
            logits.append(model(input_ids=torch.tensor([reference[:-1]]), past_key_values=cache).logits[0])
    assert record["mean_kl"] == pytest.approx(measure.kl_divergence(*logits).mean().item(), rel=1e-3)


def test_an_answer_of_one_token_has_no_divergence(model, tokenizer, ids):
    records = compare.run(model, tokenizer, ids, [MixKVConfig(budget=40)], max_new_tokens=1, steps=2)
    assert [record["mean_kl"] for record in records] == [None, None]


def test_compare_tells_its_progress(model, tokenizer, ids):
    told = []
    compare.run(
        model, tokenizer, ids, [MixKVConfig(budget=40)], max_new_tokens=3, steps=5, progress=lambda *call: told.append(call)
    )
    assert {total for _, total in told} == {len(told)}


def test_compare_leaves_the_model_as_it_was(model, tokenizer, ids):
    before = model.config._attn_implementation
    compare.run(model, tokenizer, ids, [MixKVConfig(budget=40)], max_new_tokens=3, steps=3)
    bench.run(model, tokenizer, prompt_tokens=[100], methods=["adakv"], budget=40, repeats=1, steps=2)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, tokenizer, ids: compare.grid([("snap", "mix")], [64]), "unknown method 'snap'"),
        (lambda model, tokenizer, ids: compare.grid([("sparsemm", "mix")], [64]), "needs profile="),
        (lambda model, tokenizer, ids: compare.run(model, tokenizer, ids, [], repeats=1), "--repeats 1"),
        (lambda model, tokenizer, ids: compare.run(model, tokenizer, ids, [], max_new_tokens=500), "context of 512"),
        (lambda model, tokenizer, ids: bench.run(model, tokenizer, prompt_tokens=[600], methods=[]), "context of 512"),
        (lambda model, tokenizer, ids: bench.run(model, tokenizer, prompt_tokens=[128], methods=[]), "--prompt-tokens 128"),
        (lambda model, tokenizer, ids: prompts.encode(make_tokenizer(None), prompts.Prompt("w1")), "no chat template"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(model, tokenizer, ids, call, words):
    with pytest.raises(InputError, match=words):
        call(model, tokenizer, ids)


def test_a_profile_of_another_model_is_named(model, tokenizer, ids):
    config = MixKVConfig(method="sparsemm", profile=[[1.0, 1.0]] * 3, budget=40)
    with pytest.raises(InputError, match="profile has shape"):
        compare.run(model, tokenizer, ids, [config], max_new_tokens=2, steps=2)


@pytest.mark.usefixtures("needs_smollm2")
def test_smollm2_answers_from_a_compressed_cache():
    loaded = loading.load(device="cpu")
    text = prompts.demo().text
    middle = text.index("By the way")
    prompt = prompts.Prompt(text[middle - 1500 : middle + 1000], prompts.demo().question)
    ids = prompts.encode(loaded.tokenizer, prompt)
    full, compressed = compare.run(
        loaded.model, loaded.tokenizer, ids, [MixKVConfig(method="adakv", score="mix", budget=128)], max_new_tokens=16, steps=4
    )
    assert "honey" in full["answer"]
    assert compressed["answer"].startswith("The secret ingredient of grandmother's soup is")
    assert compressed["rows_per_head"] == 128
    assert compressed["bytes_ratio"] < 1.25 * 128 / ids.shape[1]
    assert 0 < compressed["mean_kl"] < 5
