"""What the command line measures: agreement, time and memory, on a tiny model and on SmolLM2."""

import json
import math
import sys
from importlib.util import find_spec

import pytest
import torch
from support.text_models import make_model, make_text, make_tokenizer

from mixkv import MixKVConfig
from mixkv.evaluation import InputError, bench, charts, compare, loading, machine, measure, memory, prompts


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def ids(tokenizer):
    return prompts.encode(tokenizer, prompts.Prompt(make_text(150), "w1 w2"))


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


def test_bench_records_and_targets(model, tokenizer):
    methods = ["snapkv", "pyramidkv", "adakv", "sparsemm"]
    records = bench.run(model, tokenizer, prompt_tokens=[200, 100], methods=methods, budget=40, batches=[2], repeats=2, steps=4)
    names = [(record["method"], record["prompt_tokens"]) for record in records]
    assert names == [("floor", 40)] + [(name, length) for length in (100, 200) for name in ["full", *methods]]
    by_name = dict(zip(names, records))
    assert by_name["full", 200]["bytes"] == 2 * by_name["full", 100]["bytes"]
    assert by_name["full", 200]["bytes_to_full"] == by_name["floor", 40]["step_to_floor"] == 1
    assert by_name["adakv", 200]["bytes_to_full"] < 0.5
    assert by_name["adakv", 200]["rows_per_head"] == by_name["sparsemm", 200]["rows_per_head"] == 40
    assert all(record["first_token_seconds"] > record["prefill_seconds"] for record in records)
    for record in records:
        compressed = record["method"] not in ("full", "floor")
        assert (record["compress_seconds"] > 0) == (record["prefill_to_rest"] > 1) == compressed
        assert record["compress_seconds"] < record["prefill_seconds"]

    found = bench.targets(records, 40)
    assert len(found) == 4 * 2 * 3 + 2 + 4
    (bytes_target,) = [one for one in found if one["what"] == "bytes_to_full" and one["prompt_tokens"] == 200]
    assert bytes_target["limit"] == 1.25 * 40 / 200
    assert all(one["met"] == (one["value"] <= one["limit"]) for one in found)
    json.dumps([records, found])


def test_bench_at_several_batch_sizes(model, tokenizer):
    options = dict(prompt_tokens=[100, 200], methods=["adakv"], budget=40, repeats=1, steps=2)
    told = []
    records = bench.run(model, tokenizer, batches=[3, 1], progress=lambda *call: told.append(call), **options)
    assert [record["batch"] for record in records] == [1] * 5 + [3] * 5
    for one, three in zip(records[:5], records[5:]):
        assert (one["method"], one["prompt_tokens"]) == (three["method"], three["prompt_tokens"])
        assert one["rows_per_head"] == three["rows_per_head"] and 2 < three["bytes"] / one["bytes"] <= 3
    assert {total for _, total in told} == {len(told)}
    assert [found["batch"] for found in bench.targets(records, 40)] == [1] * 9 + [3] * 9


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell a process's peak")
def test_peak_memory_of_a_piece_of_work():
    cpu, size, slack = torch.device("cpu"), 2**26, 2**24
    for count in (0, size):
        before = memory.start(cpu)
        torch.ones(count, dtype=torch.uint8)
        assert max(0, count - slack) <= memory.peak(cpu, before) < count + slack
    assert memory.peak(cpu, None) is None


@pytest.mark.parametrize("batches", [(1,), (1, 2)])
def test_a_picture_of_a_benchmark(model, tokenizer, tmp_path, batches):
    pytest.importorskip("matplotlib", reason="needs mixkv[plot]")
    methods = ["snapkv", "adakv"]
    records = bench.run(
        model, tokenizer, prompt_tokens=[100, 200], methods=methods, budget=40, batches=batches, repeats=1, steps=2
    )
    charts.bench(records, str(tmp_path / "out.svg"), "a title")
    drawn = (tmp_path / "out.svg").read_text()
    # Texts of a picture in SVG are shapes, with the text itself in a comment before them.
    assert all(f"<!-- {word} -->" in drawn for word in ("a title", "full", "snapkv", "adakv", "floor: 40 tokens"))
    assert ("(batch 2)" in drawn) == (batches == (1, 2))


def test_append_times(model):
    small, large = bench.append_times(model, stored=(8, 64), appends=40)
    assert (small["rows_per_head"], large["rows_per_head"]) == (8, 64)
    assert min(small["in_place_seconds"], small["growing_seconds"], large["in_place_seconds"]) > 0


def test_a_shared_machine_is_noticed(monkeypatch):
    monkeypatch.setattr(machine, "_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert machine.crowded(None) is None and machine.crowded(0.1) is None
    assert "1.5 of the 4 cores" in machine.crowded(1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine.crowded(1.5) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert machine.crowded(4.0) is None


def test_others_are_not_this_process():
    others = machine.Others()
    others.busy = None
    assert others.cores() is None
    others.busy, others.own, others.began = machine._busy_seconds(), 0.0, 0.0
    assert others.cores() in (None, 0.0)


@pytest.mark.parametrize("count", [5, 700])
def test_filler_has_the_length_asked_for(tokenizer, count):
    assert prompts.filler(tokenizer, count, batch=3).shape == (3, count)


def test_the_demo_text_is_whole():
    prompt = prompts.demo()
    assert 7000 < len(prompt.text) < 9000
    before, after = prompt.text.split("By the way, the secret ingredient of grandmother's soup is a spoonful of honey.")
    assert min(len(before), len(after)) > 2000


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


@pytest.mark.skipif(not all(map(find_spec, loading.PACKAGES)), reason="needs mixkv[demo]")
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


@pytest.mark.parametrize("rank, gpu", [(None, 0), ("0", 0), ("1", 1), ("5", 1)])
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch, rank, gpu):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading._device(None) == torch.device("cuda", gpu)
    assert loading._device("cpu") == torch.device("cpu")
