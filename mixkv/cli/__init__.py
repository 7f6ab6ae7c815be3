"""The command line: parses arguments, runs one command, returns an exit code. The commands call `mixkv.evaluation`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from . import parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; see ``mixkv --help``.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns: 0; 2 for invalid input, with a message of one line on standard error; 130 after Ctrl-C.
    """
    options = parser.make_parser().parse_args(arguments)
    from ..evaluation import InputError

    try:
        with _warnings_on_one_line():
            options.run(options)
    except InputError as error:
        print(f"mixkv {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    """Warnings as their message alone, in place of a file, a category and a line of its source."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
