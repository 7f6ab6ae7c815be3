"""mixkv read and mixkv ask: a document is read once and answers from its file."""

import io
import sys

import pytest
import torch
from support import zoo, zoo_processors
from support.text_models import make_model, make_text, make_tokenizer

from mixkv import cli
from mixkv.cache.save import read as read_saved
from mixkv.evaluation import documents, loading
from mixkv.evaluation.loaded import Loaded
from mixkv.hf.image_tokens import image_token_ids

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, and texts to go with it."""
    path = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    (path / "one.txt").write_text(make_text(100), encoding="utf-8")
    (path / "two.md").write_text(make_text(50), encoding="utf-8")
    (path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (path / "empty.txt").write_text("\n")
    (path / "long.txt").write_text(make_text(600))
    return path


@pytest.fixture(scope="module")
def kept(folder):
    """The two texts as one compressed document."""
    out = folder / "kept.mixkv"
    files = [str(folder / "one.txt"), str(folder / "two.md")]
    assert cli.main(["read", *files, "--model", str(folder), "--out", str(out), "--budget", "48"]) == 0
    return out


def full_answer(folder, question, tokens):
    """What the model answers with its own cache."""
    model, tokenizer = make_model(), make_tokenizer()
    ids = tokenizer(f"user {make_text(100)}\n\n{make_text(50)}\n\n{question} answer ", return_tensors="pt")["input_ids"]
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_a_threshold_in_place_of_a_budget(folder, capsys):
    out, kept = folder / "auto.mixkv", []
    for threshold in ("0.001", "0.9"):
        options = ["--budget", "auto", "--threshold", threshold]
        assert cli.main(["read", str(folder / "one.txt"), "--model", str(folder), "--out", str(out), *options]) == 0
        config = read_saved(out).config
        assert config.budget == "auto" and config.threshold == float(threshold)
        kept.append(out.stat().st_size)
    assert kept[0] > kept[1]
    assert cli.main(["ask", str(out), "w5", "--max-new-tokens", "6"]) == 0
    capsys.readouterr()
    arguments = ["read", str(folder / "one.txt"), "--model", str(folder), "--out", str(out), "--budget", "auto"]
    assert cli.main([*arguments, "--score", "mix"]) == 2
    assert "budget='auto' does not go with score='mix'" in capsys.readouterr().err


def test_a_document_is_read_once_and_asked_later(folder, kept, capsys):
    saved = read_saved(kept)
    assert saved.config.score == "replay" and saved.config.budget == 48
    about = saved.header["about"]["document"]
    assert about["model"] == str(folder) and len(about["ids"]) == 151 and about["end"] == " answer "
    capsys.readouterr()
    assert cli.main(["ask", str(kept), "w3 w4", "w5", "--max-new-tokens", "6"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert len(first) == 2 and all(first)
    assert cli.main(["ask", str(kept), "w5", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out.splitlines() == first[1:]


def test_questions_come_from_a_terminal(kept, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3\nw4 w5\n\nw6\n"))
    assert cli.main(["ask", str(kept), "--max-new-tokens", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_document_kept_whole_answers_as_the_model_does(folder, tmp_path, capsys):
    out = tmp_path / "whole.mixkv"
    files = [str(folder / "one.txt"), str(folder / "two.md")]
    options = ["--model", str(folder), "--out", str(out), "--budget", "1.0", "--method", "snapkv", "--score", "attn"]
    assert cli.main(["read", *files, *options]) == 0
    assert "151 tokens read" in capsys.readouterr().out
    assert cli.main(["ask", str(out), "w3 w4", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out.strip() == full_answer(folder, "w3 w4", 6)


def test_pdf_text_is_read(folder, tmp_path, capsys):
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "blank.pdf")
    assert cli.main(["read", str(tmp_path / "blank.pdf"), "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "has no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file, message",
    [
        ("missing.txt", "no such file"),
        ("latin.txt", "neither UTF-8 text"),
        ("empty.txt", "has no text"),
        ("long.txt", "exceed the model's context"),
    ],
)
def test_what_cannot_be_read(folder, tmp_path, capsys, file, message):
    assert cli.main(["read", str(folder / file), "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_what_cannot_be_asked(folder, kept, tmp_path, capsys):
    make_model(hidden_size=32).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    (tmp_path / "text").write_text("no cache")
    capsys.readouterr()
    for file, model in ((tmp_path / "missing", folder), (tmp_path / "text", folder), (kept, tmp_path / "other")):
        assert cli.main(["ask", str(file), "w3", "--model", str(model)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_page_images_are_read_once_and_asked_later(name, tmp_path, monkeypatch, capsys):
    loaded = Loaded(zoo.build(name), zoo_processors.build(name).tokenizer, name, zoo_processors.build(name))
    monkeypatch.setattr(loading, "load", lambda *arguments, **options: loaded)
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "page.png")
    (tmp_path / "text.txt").write_text(" ".join(f"w{index % 60 + 10}" for index in range(40)))
    files = [str(tmp_path / "page.png"), str(tmp_path / "text.txt")]
    whole = [str(tmp_path / "whole"), "--budget", "1.0", "--method", "snapkv", "--score", "attn"]
    assert cli.main(["read", *files, "--out", *whole]) == 0
    assert cli.main(["read", *files, "--out", str(tmp_path / "small"), "--budget", "40"]) == 0
    document = documents.Document.of(files)
    full = documents.keep(loaded, document, None).ask("w20 w30", max_new_tokens=5)
    capsys.readouterr()
    for file in ("whole", "small"):
        assert cli.main(["ask", str(tmp_path / file), "w20 w30", "--max-new-tokens", "5"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert answers[0] == full and len(answers) == 2
    ids = documents.keep(loaded, document, None).ids[0]
    assert torch.isin(ids, torch.tensor(sorted(image_token_ids(loaded.model.config)))).sum() >= 4
