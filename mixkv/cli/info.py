"""``mixkv info``: the environment."""

from __future__ import annotations

import argparse


def add_parser(commands) -> None:
    command = commands.add_parser("info", help="versions, the machine, and the back end that would be used")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..evaluation import machine
    from ..ops import build, report

    for name, value in {**machine.versions(), **machine.describe(), "cache folder": build.cache_folder()}.items():
        print(f"{name:<14}{'none' if value is None else value}")
    for line in report.report():
        print(line)
