"""Head profiles: how much each attention head matters, for method='sparsemm'. Load and save."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Table = tuple[tuple[float, ...], ...]

_HEAD_NAME = re.compile(r"(\d+)-(\d+)")


def load(path: str | Path) -> Table:
    """Reads a head profile: a JSON list of rows, or a mapping ``"layer-head"`` to a score or a list of scores.

    The mapping is the format of published SparseMM profiles (arXiv 2506.05344); a list of scores counts as its mean.

    Returns: the table [layers, heads].

    Raises:
        ValueError: the file does not hold such a profile; the message names the file and what is missing.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"profile file {path} does not exist") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"profile file {path} is not JSON: {error}") from error
    try:
        return as_table("profile", _from_mapping(content) if isinstance(content, dict) else content)
    except ValueError as error:
        raise ValueError(f"profile file {path}: {error}") from error


def save(profile: Any, path: str | Path) -> None:
    """Writes a table [layers, heads] as a JSON list of rows."""
    Path(path).write_text(json.dumps(as_table("profile", profile)))


def as_table(name: str, values: Any) -> Table:
    """Nested lists, an array or a tensor as a tuple of equally long tuples of floats.

    Raises:
        ValueError: not two-dimensional, ragged, empty, or not finite numbers.
    """
    if hasattr(values, "tolist"):
        values = values.tolist()
    try:
        table = tuple(tuple(float(value) for value in row) for row in values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a table of numbers, one row a layer, one column a head: {error}") from error
    if not table or not table[0] or len({len(row) for row in table}) != 1:
        raise ValueError(
            f"{name} must be a table [layers, heads] with rows of one length, got row lengths {[len(r) for r in table]}"
        )
    if not all(abs(value) < float("inf") for row in table for value in row):
        raise ValueError(f"{name} must hold finite numbers")
    return table


def _from_mapping(scores: dict[str, Any]) -> list[list[float]]:
    cells: dict[tuple[int, int], float] = {}
    for name, value in scores.items():
        match = _HEAD_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"key {name!r} is not of the form 'layer-head'")
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(number, (int, float)) for number in values):
            raise ValueError(f"{name!r} must hold a number or a list of numbers, not {value!r}")
        cells[int(match[1]), int(match[2])] = sum(values) / len(values)
    if not cells:
        raise ValueError("no heads in it")
    layers, heads = (1 + max(index) for index in zip(*cells))
    missing = [f"{layer}-{head}" for layer in range(layers) for head in range(heads) if (layer, head) not in cells]
    if missing:
        raise ValueError(f"heads are missing: {', '.join(missing[:8])}")
    return [[cells[layer, head] for head in range(heads)] for layer in range(layers)]
