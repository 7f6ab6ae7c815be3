"""Tables in README.md and docs/ are what docs/tables.py prints, and name every method, score and option."""

import importlib.util
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
