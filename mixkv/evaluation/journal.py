"""A results file with one line per sample, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import InputError


class Journal:
    """JSON lines: a header that describes the run, then one record per sample.

    Attributes:
        records: of the samples finished so far.
    """

    def __init__(self, path: str, header: dict[str, Any], *, resume: bool):
        """Creates ``path``, or with ``resume`` opens the file of an earlier run of the same ``header``.

        Raises:
            InputError: the file exists and ``resume`` is False, cannot be written, is of another run, or is damaged.
        """
        self.path, self.header = Path(path), header
        self.records: list[dict[str, Any]] = []
        if self.path.exists() and not resume:
            raise InputError(f"--out {path} exists: continue it with --resume, or name another file")
        try:
            if self.path.exists():
                self._resume()
            else:
                self._append(header)
        except OSError as error:
            raise InputError(f"--out {path} cannot be written: {error.strerror}") from error

    def add(self, record: dict[str, Any]) -> None:
        """Writes the record of one sample to the disk."""
        self._append(record)
        self.records.append(record)

    def _append(self, item: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _resume(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole, _, cut = text.rpartition("\n")
        lines = [_parse(self.path, number, line) for number, line in enumerate(whole.splitlines(), 1)]
        if not lines:
            raise InputError(f"--out {self.path} has no header: delete it and run without --resume")
        for field in sorted(self.header.keys() | lines[0].keys()):
            before, now = lines[0].get(field), self.header.get(field)
            if field not in ("machine", "versions") and before != now:
                raise InputError(
                    f"--out {self.path} was started with {field}={before!r}, and this run has {now!r}: run with the same options, or "
                    f"name another file"
                )
        self.records = lines[1:]
        if cut:
            # The run was interrupted in the middle of this line.
            with open(self.path, "r+", encoding="utf-8") as file:
                file.truncate(len((whole + "\n").encode()))


def read(path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records of a finished file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    parsed = [_parse(Path(path), number, line) for number, line in enumerate(lines, 1)]
    if not parsed:
        raise InputError(f"{path} is empty")
    return parsed[0], parsed[1:]


def name(record: dict[str, Any]) -> tuple[str, int, int]:
    """Identifies the sample of a record: task, tokens, seed."""
    return record["task"], record["tokens"], record["seed"]


def merge(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records sorted by sample, without duplicates."""
    found = {name(record): record for record in records}
    return [found[each] for each in sorted(found)]


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number} is not JSON ({error.msg}): correct or delete that line") from error
    if not isinstance(item, dict):
        raise InputError(f"{path}, line {number} is not a JSON object: correct or delete that line")
    return item
