"""The parser of all commands."""

from __future__ import annotations

import argparse

from . import ask, bench, build, calibrate, compare, demo, evaluate, info, read

# In the order of ``mixkv --help``. Each module has ``add_parser(commands)``, which sets the default ``run``: a function of the
# parsed options. To add a command, write such a module and list it here.
COMMANDS = (demo, read, ask, compare, bench, evaluate, calibrate, build, info)


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``mixkv``, with a subparser for each command."""
    parser = argparse.ArgumentParser(
        prog="mixkv", description="A compressed KV cache for transformers: try it, compare it, measure it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
