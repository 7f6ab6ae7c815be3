"""Samples over the processes of ``accelerate launch`` or torchrun: each evaluates its part, the first puts all together."""

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
    """Does this process's part of what ``book`` lacks.

    Args:
        samples: (name, how it is made), of all processes.
        run: takes such samples, and yields a record each.

    Returns: the records of all ``samples``, in their order; None in the processes that do not report.
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
    """Finished samples, kept in a file where there is one: a `Journal`, and beside it one a process while several run.

    Attributes:
        records: the samples finished before this run, by whichever process.
    """

    def __init__(self, path: str | None, header: dict[str, Any], *, resume: bool):
        """Opens ``path`` (None: nothing is kept); errors as in `Journal`.

        Raises:
            InputError: several processes run and there is no file to meet in.
        """
        self.path, self.header, self.records, self._journal = path, header, [], None
        if path is None:
            if processes() > 1:
                raise InputError("several processes put their samples together in a file: name it with --out")
            return
        if not resume and any(self._parts()):
            raise InputError(f"--out {path} was begun by several processes: continue it with --resume, or name another file")
        if processes() == 1:
            self._journal = Journal(path, header, resume=resume)
            self.records = list(self._journal.records)
            self._take_parts()
            return
        if Path(path).exists():
            self.records = Journal(path, header, resume=resume).records
        for part in self._parts():
            self.records = self.records + Journal(str(part), header, resume=True).records
        # Only once all have read what there is may one begin to write.
        _wait()
        self._journal = Journal(f"{path}.{rank()}", header, resume=True)

    def add(self, record: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.add(record)

    def close(self) -> bool:
        """Waits for all processes. True for the one that puts everything together, in `path`, and should report it."""
        if processes() == 1:
            return True
        _wait()
        if rank() == 0:
            self._journal = Journal(self.path, self.header, resume=True)
            self.records = list(self._journal.records)
            self._take_parts()
        return rank() == 0

    def _take_parts(self) -> None:
        """Moves what other processes finished into this one's journal."""
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

    # Without a GPU it must be told, or it takes several processes for one and waits for nobody.
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != processes():
        raise InputError(f"accelerate sees {state.num_processes} processes where WORLD_SIZE says {processes()}")
    state.wait_for_everyone()
