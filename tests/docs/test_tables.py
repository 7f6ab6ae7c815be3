"""Tables in README.md and docs/ are what docs/tables.py prints, and name every method, score and option."""

import importlib.util
import re
from pathlib import Path

import pytest

from mixkv import registry

ROOT = Path(__file__).parents[2]


def load():
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load()


@pytest.mark.parametrize("page", tables.files(), ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert tables.up_to_date(text) == text, "run python docs/tables.py --write"


def test_every_table_has_its_place():
    pages = "".join(page.read_text(encoding="utf-8") for page in tables.files())
    missing = [name for name in tables.TABLES if f"<!-- table: {name} -->" not in pages]
    assert not missing


@pytest.mark.parametrize("name, entries", [("methods", registry.METHODS), ("scores", registry.SCORES)])
def test_the_catalogue_is_complete(name, entries):
    printed = tables.TABLES[name]()
    assert [line.split("`")[1] for line in printed.splitlines()[2:]] == [e.name for e in entries.values() if e.built_in]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_quoted_figures_are_those_of_the_tables(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    rows = [line.split(" | ") for line in tables.speed().splitlines() if line.startswith("| 4,096")]
    shares = [float(row[4].rstrip("%")) for row in rows if "full" not in row[1]]
    assert f"{min(shares)} to {max(shares)} %" in text


def test_quoted_answers_are_those_of_the_tables():
    text = " ".join((ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").split())
    found = {line.split(" | ")[3] for line in tables.later().splitlines()[2:]}
    quoted = [f"{kept} of {total}" for kept, total in re.findall(r"(\d+) (?:of|\()\s?(231)", text)]
    assert quoted and set(quoted) <= found


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_quoted_answers_of_later_questions_are_those_of_the_table(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    head, _, *rows = (line.split(" | ") for line in tables.once().splitlines())
    total = re.search(r"\d+", head[3])[0]
    quoted = re.findall(rf"(\d+) of {total} answers about texts", text)
    assert quoted and set(quoted) <= {row[3] for row in rows}
