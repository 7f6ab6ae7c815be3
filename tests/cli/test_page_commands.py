"""mixkv demo --vision and mixkv eval on pages."""

import pytest

from mixkv import cli
from mixkv.evaluation import compare

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("needs_smollm2")


def test_demo_draws_what_is_kept_of_a_page(tmp_path, monkeypatch, capsys):
    run = compare.run

    def run_briefly(model, tokenizer, ids, configs, **options):
        return run(model, tokenizer, ids, configs[:1], **options | dict(max_new_tokens=4, steps=2))

    monkeypatch.setattr(compare, "run", run_briefly)
    picture = tmp_path / "page.png"
    assert cli.main(["demo", "--vision", "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 10_000 and "On the page:" in capsys.readouterr().out
    assert cli.main(["demo", "--vision", "--picture", str(tmp_path / "page.txt")]) == 2
    assert "--picture" in capsys.readouterr().err


def test_eval_on_pages(tmp_path, capsys):
    results = tmp_path / "samples.jsonl"
    options = ["--samples", "1", "--budget", "48", "--method", "snapkv", "--score", "mix", "--out", str(results)]
    assert cli.main(["eval", "--task", "screen,table-later", "--variant", "font", "--keys", "2", *options]) == 0
    printed = capsys.readouterr().out
    assert "screen, budget 48" in printed and "table-later, budget 48" in printed and len(results.read_text().splitlines()) == 3
    assert cli.main(["eval", "--task", "form", "--variant", "colour", *options]) == 2
    assert "unknown --variant 'colour'; choose from fresh, words, phrasing, layout, font" in capsys.readouterr().err
