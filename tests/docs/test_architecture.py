"""docs/architecture.md names files that exist and every room, docs/looking.md every picture."""

import re
from pathlib import Path

import pytest

import mixkv.plot

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`((?:[\w.]+/)*(?:\w+\.py|\w+/))`", TEXT)))


@pytest.mark.parametrize("name", NAMED)
def test_named_files_exist(name):
    assert (ROOT / "mixkv" / name).exists() or (ROOT / name).exists()


def test_every_room_is_named():
    rooms = {folder.name for folder in (ROOT / "mixkv").iterdir() if (folder / "__init__.py").is_file()}
    assert rooms <= {name.strip("/") for name in NAMED}


def test_every_picture_is_listed():
    page = (ROOT / "docs" / "looking.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `mixkv\.plot\.(\w+)\(", page, re.M)) == set(mixkv.plot.__all__)
