"""Files about the project agree with the package."""

import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import mixkv

ROOT = Path(__file__).parents[1]
# Installed with the base package: no extra is needed to import them.
ROOMS = ("cache", "selection", "storage", "ops", "hf")
tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later")


def test_one_version():
    """The changelog dates what has been released, the citation names the last release, the package is that or the next one."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.search(r"^## \[([\d.]+)\] - ", changes, re.MULTILINE)[1]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
    present = Version(mixkv.__version__)
    assert cited == released
    assert present == Version(released) or (
        present.is_devrelease and present > Version(released) and "## [Unreleased]" in changes
    )


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {Requirement(line).name for line in project["dependencies"]}
    files = [*(ROOT / "mixkv").glob("*.py"), *(file for room in ROOMS for file in (ROOT / "mixkv" / room).rglob("*.py"))]
    imported = set()
    for file in files:
        # What a function imports is optional, and checked there.
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    assert {"torch", "safetensors"} <= imported
    assert imported - sys.stdlib_module_names <= declared
