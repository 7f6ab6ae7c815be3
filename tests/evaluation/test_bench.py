"""Time and memory of caches, their targets and their picture."""

import json

import pytest

from mixkv import registry
from mixkv.evaluation import bench, charts


def test_bench_records_and_targets(model, tokenizer):
    methods = list(registry.METHODS)
    evicting = [method.name for method in registry.METHODS.values() if not method.keeps_chunks]
    records = bench.run(model, tokenizer, prompt_tokens=[200, 100], methods=methods, budget=40, batches=[2], repeats=2, steps=4)
    names = [(record["method"], record["prompt_tokens"]) for record in records]
    assert names == [("floor", 40)] + [(name, length) for length in (100, 200) for name in ["full", *methods]]
    by_name = dict(zip(names, records))
    assert by_name["full", 200]["bytes"] == 2 * by_name["full", 100]["bytes"]
    assert by_name["full", 200]["bytes_to_full"] == by_name["floor", 40]["step_to_floor"] == 1
    for method in evicting:
        assert by_name[method, 200]["bytes_to_full"] < 0.5
        assert by_name[method, 200]["rows_per_head"] == 40
    assert all(record["first_token_seconds"] > record["prefill_seconds"] for record in records)
    for record in records:
        compressed = record["method"] not in ("full", "floor")
        assert (record["compress_seconds"] > 0) == (record["prefill_to_rest"] > 1) == compressed
        assert record["compress_seconds"] < record["prefill_seconds"]

    found = bench.targets(records, 40)
    ratios = ["prefill_to_full", "prefill_to_rest", "step_to_floor", "bytes_to_full"]
    wanted = {(what, method, length) for what in ratios for method in evicting for length in (100, 200)}
    wanted |= {("step_to_shortest", method, 200) for method in evicting}
    assert {(one["what"], one["method"], one["prompt_tokens"]) for one in found} == wanted and len(found) == len(wanted)
    assert all(one["limit"] == 1.25 * 40 / one["prompt_tokens"] for one in found if one["what"] == "bytes_to_full")
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
    assert all(f"<!-- {word} -->" in drawn for word in ("a title", "full", "snapkv", "adakv", "floor: full cache of 40 tokens"))
    assert ("(batch 2)" in drawn) == (batches == (1, 2))


def test_append_times(model):
    small, large = bench.append_times(model, stored=(8, 64), appends=40)
    assert (small["rows_per_head"], large["rows_per_head"]) == (8, 64)
    assert min(small["in_place_seconds"], small["growing_seconds"], large["in_place_seconds"]) > 0
