"""Messages in docs/troubleshooting.md are messages of the library."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
BETWEEN = "\0"


def quoted():
    text = PAGE.read_text(encoding="utf-8")
    return [line for block in re.findall(r"^```text\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]


def constant(node):
    """A string literal, with `BETWEEN` in place of what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else BETWEEN
    if isinstance(node, ast.JoinedStr):
        return "".join(map(constant, node.values))
    return BETWEEN


@cache
def literals():
    nodes = [node for path in (ROOT / "mixkv").rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    found = [constant(node) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr))]
    return [re.sub(r"\{\w*\}", BETWEEN, text) for text in found]


@pytest.mark.parametrize("message", quoted())
def test_message_exists(message):
    parts = [part.strip() for part in message.split("...") if part.strip()]
    assert parts
    assert any(all(part in text for part in parts) for text in literals()), "the library has no such message any more"


def test_a_message_that_does_not_exist_is_noticed():
    assert not any("the cache is on fire" in text for text in literals())
