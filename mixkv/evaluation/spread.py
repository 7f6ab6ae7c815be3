"""Samples distributed over the processes of ``accelerate launch`` or torchrun. The first process collects the records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import InputError
from .journal import Journal, merge, name


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def carry_out(
    book: Book, samples: list[tuple], run: Callable[[list[tuple]], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]] | None:
    """Runs this process's part of the samples that are missing in ``book``.

    Args:
        samples: of all processes: the identity of each, and the function that makes it.
        run: yields a record for each of the samples that it is given.

    Returns: in the first process the records of all ``samples``, sorted; None in the others.
    """
    records = list(book.records)
    done = set(map(name, records))
    for record in run([sample for sample in samples[rank() :: processes()] if sample[0] not in done]):
        records.append(record)
        book.add(record)
    if not book.close():
        return None
    wanted = {each for each, _ in samples}
    return [record for record in merge(book.records if processes() > 1 else records) if name(record) in wanted]


class Book:
    """The records of finished samples in a `Journal`; if several processes run, each also has a journal of its own.

    Attributes:
        records: of the samples that were finished before this run, by any process.
    """

    def __init__(self, path: str | None, header: dict[str, Any], *, resume: bool):
        """Opens ``path``; None: records are not written. Errors are those of `Journal`, and:

        Raises:
            InputError: several processes run and ``path`` is None.
        """
        self.path, self.header, self.records, self._journal = path, header, [], None
        if path is None:
            if processes() > 1:
                raise InputError("several processes collect their samples in a file: name it with --out")
            return
        if not resume and any(self._parts()):
            raise InputError(f"--out {path} was started by several processes: continue it with --resume, or name another file")
        if processes() == 1:
            self._journal = Journal(path, header, resume=resume)
            self.records = list(self._journal.records)
            self._collect_parts()
            return
        if Path(path).exists():
            self.records = Journal(path, header, resume=resume).records
        for part in self._parts():
            self.records = self.records + Journal(str(part), header, resume=True).records
        # No process writes before all processes have read the files.
        _wait()
        self._journal = Journal(f"{path}.{rank()}", header, resume=True)

    def add(self, record: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.add(record)

    def close(self) -> bool:
        """Waits for all processes. The first one collects all records in ``path``; only there the result is True."""
        if processes() == 1:
            return True
        _wait()
        if rank() == 0:
            self._journal = Journal(self.path, self.header, resume=True)
            self.records = list(self._journal.records)
            self._collect_parts()
        return rank() == 0

    def _collect_parts(self) -> None:
        """Moves the records of other processes to this one's journal."""
        known = {name(record) for record in self.records}
        for part in self._parts():
            for record in merge(Journal(str(part), self.header, resume=True).records):
                if name(record) not in known:
                    self._journal.add(record)
                    self.records.append(record)
                    known.add(name(record))
            part.unlink()

    def _parts(self) -> Iterator[Path]:
        path = Path(self.path)
        return iter(sorted(part for part in path.parent.glob(f"{path.name}.*") if part.suffix[1:].isdecimal()))


def _wait() -> None:
    import torch
    from accelerate import PartialState

    # Without a GPU, accelerate detects the other processes only if ``cpu`` is set.
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != processes():
        raise InputError(
            f"accelerate has {state.num_processes} processes, and WORLD_SIZE is {processes()}: start them with accelerate launch"
        )
    state.wait_for_everyone()
