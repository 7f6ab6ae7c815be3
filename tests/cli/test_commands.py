"""The command line: exit codes, one-line errors, JSON."""

import importlib.util
import json
import re
import sys
import warnings
from subprocess import run

import pytest
from support.text_models import make_model, make_text, make_tokenizer

from mixkv import cli, registry
from mixkv.cli import demo, parser
from mixkv.evaluation.loaded import Loaded

pytest.importorskip("rich")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, and a text to go with it."""
    path = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    (path / "text.txt").write_text(make_text(150), encoding="utf-8")
    (path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (path / "empty.txt").write_text("\n")
    (path / "long.txt").write_text(make_text(600))
    return path


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """A saved model whose tokenizer has no chat template."""
    path = tmp_path_factory.mktemp("plain")
    make_model().save_pretrained(path)
    make_tokenizer(None).save_pretrained(path)
    return path


def compare_arguments(folder, text="text.txt", **options):
    given = {"model": folder, "prompt-file": folder / text, "budget": "40", "max-new-tokens": 4, **options}
    return ["compare", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]


def test_compare_prints_and_writes(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = compare_arguments(folder, budget="40,0.5", method="snapkv,adakv", score="mix", question="w3 w4", json=out)
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("full cache", "snapkv", "adakv", "0.5", "Question: w3 w4"))
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report) == {"machine", "versions", "settings", "runs", "configs"}
    assert [(run["method"], run["budget"]) for run in report["runs"]] == [
        ("full", None),
        ("snapkv", 40),
        ("adakv", 40),
        ("snapkv", 0.5),
        ("adakv", 0.5),
    ]
    assert report["settings"]["command"] == "compare" and report["settings"]["model"] == str(folder)
    assert len(report["configs"]) == 4


def test_compare_without_chat_template(plain_folder, folder):
    arguments = compare_arguments(folder, model=plain_folder, method="snapkv", score="attn")
    assert cli.main(arguments) == 2
    assert cli.main([*arguments, "--no-chat"]) == 0


def test_bench_prints_and_writes(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = [
        "bench",
        "--model",
        folder,
        "--prompt-tokens",
        "100,200",
        "--budget",
        40,
        "--repeats",
        1,
        "--steps",
        3,
        "--json",
        out,
    ]
    assert cli.main([str(part) for part in arguments]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("floor", *registry.METHODS))
    report = json.loads(out.read_text())
    assert {run["method"].partition("+")[0] for run in report["runs"]} == {"floor", "full", *registry.METHODS}
    assert [entry["rows_per_head"] for entry in report["append"]] == [128, 4096]
    assert {entry["met"] for entry in report["targets"]} <= {True, False}


def test_bench_draws(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs mixkv[plot]")
    out = tmp_path / "out.png"
    options = {"model": folder, "prompt-tokens": 100, "budget": 40, "repeats": 1, "steps": 2, "methods": "adakv", "plot": out}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    assert cli.main(["bench", *arguments, "--batch", "1,2"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "batch size 2, 100 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "words"),
    [("out.abc", [".png", ".svg"]), ("no/such/folder/out.png", ["no/such/folder"]), ("out.png", ["mixkv[plot]"])],
)
def test_a_picture_that_cannot_be_drawn(folder, monkeypatch, capsys, path, words):

    if "mixkv[plot]" in words:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)
        )
    else:
        pytest.importorskip("matplotlib", reason="needs mixkv[plot]")
    assert cli.main(["bench", "--model", str(folder), "--plot", path]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"mixkv bench: error: --plot {path}") and "\n" not in error
    assert all(word in error for word in words)


def test_info(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("torch", "transformers", "threads", "back end", "cache folder"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt-file": "missing.txt"}, ["missing.txt", "No such file"]),
        ({"text": "latin.txt"}, ["latin.txt", "UTF-8", "byte 3"]),
        ({"text": "empty.txt"}, ["empty.txt", "is empty"]),
        ({"text": "long.txt"}, ["context of 512", "shorten"]),
        ({"method": "snap"}, ["'snap'", "snapkv, pyramidkv"]),
        ({"score": "mixed"}, ["'mixed'", "mix-fixed"]),
        ({"budget": "16"}, ["budget=16", "window=32"]),
        ({"method": "sparsemm"}, ["needs profile="]),
        ({"method": "sparsemm", "profile": "none.json"}, ["none.json", "does not exist"]),
        ({"model": "no/such/model/here"}, ["'no/such/model/here'", "give a folder"]),
        ({"device": "abacus"}, ["'abacus'"]),
        ({"repeats": "1"}, ["--repeats 1"]),
        ({"json": "no/such/folder/out.json"}, ["no/such/folder"]),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(folder, capsys, options, words):
    assert cli.main(compare_arguments(folder, **options)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mixkv compare: error:") and "\n" not in error
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["compare"],
        ["compare", "--prompt-file", "x", "--budget", "many"],
        ["bench", "--batch", "0"],
        ["bench", "--dtype", "int8"],
    ],
    ids=" ".join,
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["gguf", "accelerate", "rich"])
def test_a_missing_extra_is_named(monkeypatch, capsys, missing):

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find_spec(name, *rest))
    assert cli.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert missing in error and "pip install 'mixkv[demo]'" in error


def test_the_demo_ends_with_commands_that_exist(monkeypatch, capsys):
    monkeypatch.setattr(demo, "print_comparison", lambda *arguments: (None, None))
    monkeypatch.setattr(demo, "print_questions", lambda loaded: None)
    pytest.importorskip("gguf")
    assert cli.main(["demo"]) == 0
    commands = re.findall(r"^  mixkv (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert commands and set(commands) <= {command.__name__.rpartition(".")[2] for command in parser.COMMANDS}


def test_the_demo_asks_about_a_text_that_was_read_once(capsys):
    model, tokenizer = make_model(max_position_embeddings=4096), make_tokenizer()
    demo.print_questions(Loaded(model, tokenizer, "tiny"))
    printed = capsys.readouterr().out
    assert "read and compressed once" in printed and "mixkv.read" in printed and printed.count("of 5") == 3


def test_texts_need_no_package_of_pages(folder):
    code = "import sys; sys.modules.update(PIL=None, matplotlib=None, torchvision=None); from mixkv import cli; cli.main(sys.argv[1:])"
    done = run([sys.executable, "-c", code, *compare_arguments(folder)], capture_output=True, text=True, timeout=300)
    assert "snapkv" in done.stdout, done.stderr


def test_warnings_are_one_line(capsys, monkeypatch):
    shown = warnings.formatwarning
    monkeypatch.setattr("mixkv.cli.info.run", lambda options: warnings.warn("mixkv: plain torch is used"))
    with warnings.catch_warnings():
        warnings.resetwarnings()
        # pytest records warnings in place of showing them.
        monkeypatch.setattr(
            warnings, "showwarning", lambda *given: print(warnings.formatwarning(*given), end="", file=sys.stderr)
        )
        assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "mixkv: plain torch is used\n" and warnings.formatwarning is shown
