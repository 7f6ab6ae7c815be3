"""mixkv calibrate: resumed, in two processes, saved, and invalid input."""

import json

import pytest
import torch
from support import zoo
from support.asked_pages import SIZES, ask, use_small_pages
from support.processes import run_two

from mixkv import MixKVCache, cli, head_profile
from mixkv.evaluation import boxes, journal, pages
from mixkv.evaluation.tasks import Sample

pytest.importorskip("rich")


@pytest.mark.usefixtures("needs_smollm2")
def test_a_profile_of_texts(tmp_path, capsys):
    out = tmp_path / "profile.safetensors"
    options = ["--kind", "codes,lookup", "--tokens", "200", "--pages", "4", "--seed-step", "2", "--out", str(out)]
    assert cli.main(["calibrate", *options]) == 0
    assert "4 pages: " in capsys.readouterr().out
    _, records = journal.read(f"{out}.jsonl")
    assert [journal.name(one) for one in records] == [(kind, 200, seed) for seed in (0, 2) for kind in ("codes", "lookup")]
    profile = head_profile.load(out)
    assert profile.model == "llama" and (len(profile), len(profile[0])) == (30, 9)
    assert all(one["right"] <= one["boxed"] for one in records) and sum(map(sum, profile)) > 0


def arguments(out, *options):
    return ["calibrate", "--out", str(out), "--pages", "6", "--kind", "form,table", *map(str, options)]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`mixkv calibrate` on a tiny model and small pages: ``command(options) -> exit code``."""
    loaded = use_small_pages(monkeypatch)

    def run(*options, out=tmp_path / "profile.safetensors"):
        return cli.main(arguments(out, *options))

    run.loaded = loaded
    return run


def test_the_command_and_resuming_it(command, tmp_path, capsys):
    assert command() == 0
    printed = capsys.readouterr().out
    assert "6 pages: " in printed and "layer-head" in printed
    out = tmp_path / "profile.safetensors"
    header, records = journal.read(f"{out}.jsonl")
    assert (header["layers"], header["heads"]) == (2, 4)
    assert [journal.name(one) for one in records] == [(kind, 0, seed) for seed in range(3) for kind in ("form", "table")]
    profile = head_profile.load(out)
    assert profile.model == "qwen2_vl" and (len(profile), len(profile[0])) == (2, 4)
    mean = torch.zeros(2, 4, dtype=torch.float64)
    for one in records:
        for name, score in one["scores"].items():
            mean[tuple(map(int, name.split("-")))] += score / 6
    torch.testing.assert_close(torch.tensor(profile, dtype=torch.float64), mean)

    whole, lines = out.read_bytes(), (tmp_path / "profile.safetensors.jsonl").read_bytes()
    assert command() == 2 and "--resume" in capsys.readouterr().err
    out.unlink()
    (tmp_path / "profile.safetensors.jsonl").write_bytes(lines[: len(lines) * 2 // 3])
    assert command() == 2 and "--resume" in capsys.readouterr().err
    assert command("--resume") == 0
    assert out.read_bytes() == whole and (tmp_path / "profile.safetensors.jsonl").read_bytes() == lines
    assert command("--resume", "--pages", 4) == 0
    assert command("--resume") == 0
    assert out.read_bytes() == whole
    assert command(out=tmp_path / "profile.json") == 0
    assert head_profile.load(tmp_path / "profile.json") == profile


def test_two_processes_measure_what_one_does(command, tmp_path):
    pytest.importorskip("accelerate")
    assert command() == 0
    out = tmp_path / "two.safetensors"
    small = "import pytest\nfrom support import asked_pages\nasked_pages.use_small_pages(pytest.MonkeyPatch())"
    printed, finished = run_two(tmp_path, arguments(out, "--threads", 1), before=small)
    assert finished == {0: 3, 1: 3} and printed.count("6 pages: ") == 1
    one, two = (torch.tensor(head_profile.load(path)) for path in (tmp_path / "profile.safetensors", out))
    torch.testing.assert_close(one, two)
    first, second = (journal.read(f"{path}.jsonl")[1] for path in (tmp_path / "profile.safetensors", out))
    assert sorted(map(journal.name, first)) == sorted(map(journal.name, second))
    assert not list(tmp_path.glob("two.safetensors.jsonl.*"))


def test_the_profile_decides_who_gets_how_many_rows(command, tmp_path):
    assert command() == 0
    path, model = tmp_path / "profile.safetensors", command.loaded.model
    prompts = zoo.inputs("qwen2_vl", length=60)
    kept = []
    for profile in (path, head_profile.load(path), torch.tensor(head_profile.load(path)).view(2, 2, 2).sum(-1)):
        cache = MixKVCache(model, method="sparsemm", score="mix", profile=profile, budget=16, window=6)
        model.generate(**prompts, past_key_values=cache, max_new_tokens=2, do_sample=False)
        kept.append(torch.stack([layer[0] for layer in cache.stats()["lengths"]]))
    assert kept[0].equal(kept[1]) and kept[0].equal(kept[2])
    scores = torch.tensor(head_profile.load(path)).view(2, 2, 2).sum(-1)
    assert (kept[0].flatten()[scores.argmax()] == kept[0].max()) and kept[0].unique().numel() > 1


def none_right(command):
    head = command.loaded.model.get_output_embeddings().weight
    with torch.no_grad():
        head[zoo.TEXT.start :] *= 0
        head[: zoo.TEXT.start] *= 100


def text_alone(command):
    template = command.loaded.processor.chat_template
    command.loaded.processor.chat_template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", "")


@pytest.mark.parametrize(
    "options, spoil, message",
    [
        (["--kind", "screen"], None, "--kind 'screen' is not a kind of page that shows its answers; choose from form, table"),
        (["--out", "profile.txt"], None, "--out profile.txt must end in .safetensors or .json"),
        (["--out", "no/such/folder/profile.json"], None, "--out no/such/folder/profile.json cannot be written"),
        ([], none_right, "qwen2_vl gets none of the"),
        ([], text_alone, "image"),
    ],
)
def test_bad_commands(command, capsys, options, spoil, message):
    asked = [ask(command.loaded, SIZES[:1], seed) for seed in range(3)]
    boxes.make = lambda kind, seed, terse: asked[seed]
    if spoil:
        spoil(command)
    assert command(*options) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mixkv calibrate: error:") and "\n" not in error and message in error, error


def test_resuming_with_another_model_is_refused(command, tmp_path, capsys):
    assert command() == 0
    lines = (tmp_path / "profile.safetensors.jsonl").read_text().splitlines()
    (tmp_path / "profile.safetensors.jsonl").write_text("\n".join([json.dumps(json.loads(lines[0]) | {"name": "x"})]) + "\n")
    assert command("--resume") == 2
    assert "name='x', and this run has 'qwen2_vl'" in capsys.readouterr().err


def test_a_gate(monkeypatch, tmp_path, capsys):
    loaded = use_small_pages(monkeypatch)
    drawn = []

    def page(model, seed):
        drawn.append(seed)
        given = {name: part[0] if name == "input_ids" else part for name, part in zoo.inputs("qwen2_vl", 60, seed=seed).items()}
        ids, _ = given.pop("input_ids"), given.pop("attention_mask")
        return Sample(ids.tolist(), [[5]], inputs=given)

    monkeypatch.setitem(pages.TASKS, "form-later", page)
    out = tmp_path / "gate.safetensors"
    options = ["--kind", "form-later", "--pages", "3", "--first-seed", "1", "--seed-step", "2"]
    assert cli.main(["calibrate", "--gate", "--out", str(out), *options]) == 0
    assert "Written: " in capsys.readouterr().out and drawn == [1, 3, 5]
    cache = MixKVCache(loaded.model, score="gate", gate=out, budget=16, window=6)
    loaded.model.generate(**zoo.inputs("qwen2_vl", 60), past_key_values=cache, max_new_tokens=1)
    assert sum(len(head) for layer in range(2) for head in cache.kept(layer)[0]) == 2 * 2 * 16


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gate", "--kind", "poem"], "unknown --kind 'poem'"),
        (["--gate", "--out", "gate.json"], "must end in .safetensors"),
        ([], "--out FILE is needed"),
    ],
)
def test_what_a_gate_and_a_profile_need(monkeypatch, tmp_path, capsys, options, message):
    use_small_pages(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["calibrate", *options]) == 2
    assert message in capsys.readouterr().err
