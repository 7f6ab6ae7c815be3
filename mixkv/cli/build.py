"""``mixkv build``: compiles the operations of ``csrc/``, and checks the back ends of a GPU, before anything needs them."""

from __future__ import annotations

import argparse
import time


def add_parser(commands) -> None:
    command = commands.add_parser("build", help="compile the operations now, in place of at first use")
    command.add_argument(
        "--device",
        choices=["cpu", "cuda", "all"],
        default="all",
        help="what to compile for (default all: cpu, and cuda where nvcc is installed)",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..evaluation import InputError
    from ..ops import build, report

    if options.device == "all":
        devices = ["cpu", "cuda"] if build.compiler("cuda") else ["cpu"]
    else:
        devices = [options.device]
    for device in devices:
        began = time.monotonic()
        try:
            path, built = build.find(device, again=True)
        except (build.BuildError, OSError) as error:
            raise InputError(f"the operations for {device} cannot be compiled: {error}") from error
        print(f"{device}: {path} ({f'built in {time.monotonic() - began:.0f} s' if built == 'now' else built})")
    if "cuda" in devices:
        for line in report.check_gpu():
            print(line)
