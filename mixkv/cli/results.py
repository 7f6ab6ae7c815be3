"""What commands do with their results, and checks before minutes of work."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def set_threads(options: argparse.Namespace) -> None:
    """Applies ``--threads``."""
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)


def check_writable(path: str | None, option: str = "--json") -> None:
    """Checks that the folder of ``path`` exists.

    Raises:
        InputError: it does not.
    """
    from ..evaluation import InputError

    if path is not None and not Path(path).resolve().parent.is_dir():
        raise InputError(f"{option} {path} cannot be written: there is no folder {Path(path).resolve().parent}")


def print_model(console, loaded, *details: str) -> None:
    """Prints the line above all tables: the model, its dtype and its device."""
    console.print(", ".join([loaded.name, str(loaded.model.dtype), str(loaded.model.device), *details]), style="dim")


def write_json(options: argparse.Namespace, loaded, results: dict[str, Any], used_by_others: float | None = None) -> None:
    """Writes ``results`` to the file of ``--json``, with the machine, the versions and the settings.

    Args:
        used_by_others: cores that other processes used meanwhile, see `machine.Others`.

    Raises:
        InputError: the file cannot be written.
    """
    if options.json is None:
        return
    from ..evaluation import InputError, machine

    settings = {name: value for name, value in vars(options).items() if name != "run"}
    settings.update(model=loaded.name, dtype=str(loaded.model.dtype), device=str(loaded.model.device))
    described = {**machine.describe(loaded.model.device), "cores_used_by_others": used_by_others}
    report = {"machine": described, "versions": machine.versions(), "settings": settings, **results}
    try:
        Path(options.json).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {options.json} cannot be written: {error.strerror}") from error
