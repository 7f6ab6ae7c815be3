"""mixkv eval: resumed, in two processes, with profiles, and invalid input."""

import json

import pytest
from support.processes import run_two
from support.text_models import make_model, make_text, make_tokenizer

import mixkv
from mixkv import cli
from mixkv.evaluation import journal

pytest.importorskip("rich")


def arguments(tmp_path, *more):
    return ["eval", "--model", str(tmp_path), "--data", str(tmp_path / "data.jsonl"), "--budget", "40", *more]


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    lines = [{"context": make_text(100 + n), "question": [f"w{n}", "w9"], "answer": ["w1", "w2"]} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_command_and_resuming_it(folder, capsys):
    out, whole = folder / "out.jsonl", folder / "whole.json"
    assert cli.main(arguments(folder, "--out", str(out), "--json", str(whole))) == 0
    printed = capsys.readouterr().out
    assert "global mix-output" in printed and "file, 100 tokens, budget 40, 1 samples" in printed
    finished = out.read_bytes()
    out.write_bytes(finished[: len(finished) * 2 // 3])
    again = folder / "again.json"
    assert cli.main(arguments(folder, "--out", str(out), "--json", str(again))) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main(arguments(folder, "--out", str(out), "--json", str(again), "--resume")) == 0
    first, second = (json.loads(path.read_text()) for path in (whole, again))
    assert first["summary"] == second["summary"] and len(first["records"]) == 4
    assert cli.main(arguments(folder, "--out", str(out), "--resume", "--answer-tokens", "3")) == 2
    assert "answer_tokens=16" in capsys.readouterr().err


def test_a_threshold_in_place_of_a_budget(folder):
    rows = []
    for threshold in ("0.01", "0.05"):
        out = folder / f"{threshold}.json"
        options = ["--budget", "auto", "--threshold", threshold, "--cache", "global+replay,global+replay-window"]
        assert cli.main(arguments(folder, *options, "--reference", "global+replay", "--json", str(out))) == 0
        records = json.loads(out.read_text())["records"]
        rows.append([[result["rows_per_head"] for result in record["results"]] for record in records])
    assert all(few[0] < many[0] for many, few in zip(*rows))


def test_two_processes_give_what_one_gives(folder):
    pytest.importorskip("accelerate")
    one, two = folder / "one.json", folder / "two.json"
    assert cli.main(arguments(folder, "--json", str(one))) == 0
    more = ["--json", str(two), "--out", str(folder / "out.jsonl"), "--threads", "1"]
    printed, finished = run_two(folder, arguments(folder, *more))
    assert finished == {0: 2, 1: 2} and printed.count("global mix-output") == 4
    first, second = (json.loads(path.read_text()) for path in (one, two))
    for a, b in zip(first["records"], second["records"], strict=True):
        assert (a["seed"], a["answered"]) == (b["seed"], b["answered"])
        for x, y in zip(a["results"], b["results"], strict=True):
            assert x["kl"] == pytest.approx(y["kl"], abs=1e-5) and x["kept"] == y["kept"]
    assert not list(folder.glob("out.jsonl.*"))
    assert len((folder / "out.jsonl").read_text().splitlines()) == 5


def test_profiles(folder, capsys):
    path = folder / "profile.safetensors"
    options = ["--method", "sparsemm", "--score", "mix", "--profile", str(path)]
    for table, model, message in [
        ([[1.0, 2.0, 3.0, 4.0]] * 2, "llama", None),
        ([[1.0, 2.0, 3.0, 4.0]] * 2, "qwen2_vl", "measured on a model of type 'qwen2_vl', and this one is 'llama'"),
        ([[1.0, 2.0, 3.0, 4.0]] * 3, "llama", "profile has shape [3, 4], but the model has 2 compressed layers of 2 KV heads"),
    ]:
        mixkv.head_profile.save(table, path, model)
        assert cli.main(arguments(folder, *options)) == (0 if message is None else 2)
        printed = capsys.readouterr()
        assert "sparsemm mix" in printed.out if message is None else message in printed.err


def test_kinds_of_caches_in_place_of_every_combination(folder, capsys):
    out = folder / "out.jsonl"
    assert cli.main(arguments(folder, "--cache", "snapkv+mix,hybridkv+attn", "--budget", "0.4,50", "--out", str(out))) == 0
    capsys.readouterr()
    header, records = journal.read(out)
    found = [(config["method"], config["score"], config["budget"]) for config in header["configs"]]
    kinds = [("snapkv", "mix"), ("hybridkv", "attn")]
    assert found == [(*kind, budget) for budget in (0.4, 50) for kind in kinds]
    for record in records:
        pruned, chunked = record["results"][2:]
        assert pruned["rows_per_head"] == chunked["rows_per_head"] == 50
        assert pruned["resident"] == pytest.approx(50 / record["context_tokens"], abs=1e-4)
        assert pruned["resident"] + 0.02 < chunked["resident"] < pruned["resident"] + 0.2
    with pytest.raises(SystemExit):
        cli.main(arguments(folder, "--cache", "snapkv"))
    assert "'snapkv' is not METHOD+SCORE" in capsys.readouterr().err


def test_bad_commands(folder, capsys):
    assert cli.main(["eval", "--model", str(folder), "--task", "riddles"]) == 2
    assert "riddles" in capsys.readouterr().err
    assert cli.main(arguments(folder, "--method", "fastkv")) == 2
    assert "fastkv" in capsys.readouterr().err
    assert cli.main(["eval", "--model", str(folder), "--data", str(folder / "none.jsonl")]) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err
