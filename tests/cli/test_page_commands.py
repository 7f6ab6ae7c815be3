"""mixkv demo --vision and mixkv eval on pages."""

import pytest

from mixkv import cli

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("needs_smollm2")


def test_the_commands(tmp_path, capsys):
    picture, results = tmp_path / "page.png", tmp_path / "samples.jsonl"
    assert cli.main(["demo", "--vision", "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 10_000 and "On the page:" in capsys.readouterr().out
    assert cli.main(["demo", "--vision", "--picture", str(tmp_path / "page.txt")]) == 2
    assert "--picture" in capsys.readouterr().err
    options = ["--samples", "1", "--budget", "48", "--method", "snapkv", "--score", "mix", "--out", str(results)]
    assert cli.main(["eval", "--task", "screen,table-later", "--variant", "font", "--keys", "2", *options]) == 0
    printed = capsys.readouterr().out
    assert "screen, budget 48" in printed and "table-later, budget 48" in printed and len(results.read_text().splitlines()) == 3
    assert cli.main(["eval", "--task", "form", "--variant", "colour", *options]) == 2
    assert "unknown --variant 'colour'; choose from fresh, words, phrasing, layout, font" in capsys.readouterr().err
