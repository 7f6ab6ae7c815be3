"""Results of samples, against plain loops."""

import pytest
import torch
from support.text_models import make_model, make_text, make_tokenizer

import mixkv
from mixkv import MixKVConfig
from mixkv.evaluation import InputError, evaluate, measure, tasks

CONFIGS = [
    MixKVConfig(method="snapkv", score="mix", budget=40),
    MixKVConfig(method="global", score="mix-output", budget=40),
    MixKVConfig(method="adakv", score="attn", budget=1.0),
]


def sample_of(tokenizer, words=150):
    return tasks._asked(tokenizer, make_text(words), [" w3 w4", " w5"], ["w1", "never"])


def test_results_by_hand():
    model, tokenizer = make_model(), make_tokenizer()
    sample = sample_of(tokenizer)
    (record,) = evaluate.run(model, tokenizer, [(("file", 150, 0), lambda: sample)], CONFIGS, answer_tokens=6)
    assert record["context_tokens"] == 150 and len(record["results"]) == len(CONFIGS)
    everything = record["results"][2]
    assert everything["kl"] < 1e-6 and everything["top1"] == 1 and everything["kept"] == record["answered"]
    assert everything["rows_per_head"] == 150
    for config, result in zip(CONFIGS[:2], record["results"]):
        divergences = []
        for follow in sample.follow:
            context, asked = torch.tensor([sample.context]), torch.tensor([follow])
            mixkv.unpatch(model)
            whole = torch.cat([context, asked], dim=1)
            answer = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=6, do_sample=False)
            answer = answer[:, whole.shape[1] :]
            fed = torch.cat([asked, answer[:, :-1]], dim=1)
            logits = []
            for choice in (None, config):
                cache = measure.read_prompt(model, context, choice).cache
                measure.bind(model, cache)
                with torch.no_grad():
                    logits.append(model(input_ids=fed, past_key_values=cache, use_cache=True).logits[0, len(follow) - 1 :])
            divergences.append(float(measure.kl_divergence(*logits).mean()))
        assert result["kl"] == pytest.approx(sum(divergences) / 2, rel=1e-3)
        assert result["rows_per_head"] == 40


def test_a_budget_that_compresses_nothing_is_told():
    tokenizer = make_tokenizer()
    found = evaluate.run(make_model(), tokenizer, [(("file", 30, 0), lambda: sample_of(tokenizer, 30))], CONFIGS)
    with pytest.raises(InputError, match="budget 40 is not below the length of the context of task file"):
        next(found)
