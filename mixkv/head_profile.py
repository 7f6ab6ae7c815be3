"""Head profiles: how much each attention head matters, for method='sparsemm'. Load, check and save.

`mixkv calibrate` measures them; see `mixkv.evaluation.calibrate`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import checked_file

Table = tuple[tuple[float, ...], ...]

FORMAT = 1
KIND = "head profile"
# What a file with this ending holds beside the scores: a header and a checksum. Any other is JSON.
CHECKED = ".safetensors"
_HEAD_NAME = re.compile(r"(\d+)-(\d+)")


class Profile(tuple):
    """A table of head scores, one tuple a layer, that knows the model it was measured on.

    Attributes:
        model: its ``model_type``; None: not known.
    """

    model: str | None

    def __new__(cls, rows: Iterable[tuple[float, ...]], model: str | None = None):
        table = super().__new__(cls, rows)
        table.model = model
        return table

    def to_json_value(self) -> Any:
        """What `as_profile` reads back: a list of rows, or a dict of ``model`` and ``scores`` where the model is known."""
        rows = [list(row) for row in self]
        return rows if self.model is None else {"model": self.model, "scores": rows}


def load(path: str | Path) -> Profile:
    """Reads a head profile: a file that `save` wrote, or JSON: a list of rows, or a mapping ``"layer-head"`` to a score or a list
    of scores.

    The mapping is the format of published SparseMM profiles (arXiv 2506.05344); a list of scores counts as its mean.

    Raises:
        ValueError: the file contains no such profile, or is damaged; the message names the file and what is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"profile file {path} does not exist")
    if path.suffix == CHECKED:
        return _checked(path)
    try:
        return as_profile("profile", _json(path))
    except ValueError as error:
        raise ValueError(f"profile file {path}: {error}") from error


def save(profile: Any, path: str | Path, model: str | None = None, about: Mapping[str, Any] | None = None) -> None:
    """Writes a table [layers, heads] as JSON, or into a ``.safetensors`` file with a header and a checksum.

    Args:
        profile: nested lists, an array, a tensor or a `Profile`.
        model: ``model_type`` of the model it was measured on, by default that of a `Profile`; other models refuse the file.
        about: further entries of the header, JSON values. JSON does not keep them.
    """
    from . import __version__

    profile = as_profile("profile", profile)
    path, model = Path(path), model or profile.model
    if path.suffix != CHECKED:
        path.write_text(json.dumps(Profile(profile, model).to_json_value()))
        return
    header = {"format": FORMAT, "kind": KIND, "mixkv": __version__, "model": model}
    header |= {"layers": len(profile), "heads": len(profile[0]), **(about or {})}
    checked_file.write(path, header, {"scores": torch.tensor(profile, dtype=torch.float64)})


def check_model(profile: Table, model_type: str) -> None:
    """Checks that a profile may serve a model of that type; one that does not know its model may serve any.

    Raises:
        ValueError: it was measured on another.
    """
    measured = getattr(profile, "model", None)
    if measured not in (None, model_type):
        raise ValueError(
            f"the profile was measured on a model of type {measured!r}, and this one is {model_type!r}: measure one on this model "
            f"with mixkv calibrate"
        )


def _checked(path: Path) -> Profile:
    header, tensors = checked_file.read(path, range(FORMAT, FORMAT + 1), kind=KIND, maker="mixkv calibrate")
    table = as_table(f"the scores in {path}", tensors.get("scores", []))
    shape, stated = [len(table), len(table[0])], [header.get("layers"), header.get("heads")]
    if shape != stated:
        raise ValueError(
            f"{path} is damaged (its header says {stated} layers and heads, and it contains {shape}): measure it again"
        )
    return Profile(table, header.get("model"))


def _json(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not JSON ({error}); the name of a profile in safetensors ends in {CHECKED}") from error
    return _from_mapping(content) if isinstance(content, dict) and "scores" not in content else content


def as_profile(name: str, values: Any) -> Profile:
    """A table as `as_table` takes it, a `Profile`, or what its `to_json_value` returned.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(values, Mapping):
        if values.keys() != {"model", "scores"} or not isinstance(values["model"], str):
            raise ValueError(f"{name} as a dict must have model, a str, and scores, a table, not {sorted(map(str, values))}")
        return Profile(as_table(name, values["scores"]), values["model"])
    return Profile(as_table(name, values), getattr(values, "model", None))


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
