"""``mixkv ask``: questions about a document that ``mixkv read`` has saved."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from .arguments import add_threads, positive
from .results import set_threads


def add_parser(commands) -> None:
    command = commands.add_parser("ask", help="questions about a document that read has saved")
    command.add_argument("file", metavar="FILE", help="what mixkv read has saved")
    command.add_argument("questions", nargs="*", metavar="QUESTION", help="without one: a question a line, until an empty line")
    command.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="longest answer (default 64)")
    command.add_argument("--model", metavar="ID", help="Hugging Face id or folder (default: the model that read the document)")
    command.add_argument("--device", help="torch device (default: the GPU if there is one, else the CPU)")
    add_threads(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..evaluation import documents

    set_threads(options)
    kept = documents.load(options.file, options.model, device=options.device)
    for question in options.questions or _typed():
        print(kept.ask(question, max_new_tokens=options.max_new_tokens), flush=True)


def _typed() -> Iterator[str]:
    """The lines of standard input, up to an empty one; on a terminal after a prompt."""
    while True:
        if sys.stdin.isatty():
            print("? ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
