"""``mixkv bench``: time and memory."""

from __future__ import annotations

import argparse

from .. import registry
from .arguments import add_model, add_threads_and_json, list_of, positive
from .results import check_writable, print_model, set_threads, write_json


def add_parser(commands) -> None:
    command = commands.add_parser("bench", help="time and memory of every method and of the full cache")
    command.add_argument(
        "--prompt-tokens", type=list_of(positive), default=[1024, 4096], metavar="N,N", help="default 1024,4096"
    )
    command.add_argument("--budget", type=positive, default=128, metavar="N", help="KV entries per KV head (default 128)")
    methods = [
        f"{method.name}+mix-output" if method.uses_output_importance else method.name for method in registry.METHODS.values()
    ]
    command.add_argument(
        "--methods",
        type=list_of(str),
        default=methods,
        metavar="NAME,NAME",
        help=f"any of {', '.join(registry.METHODS)}, with score mix, or METHOD+SCORE (default {','.join(methods)})",
    )
    command.add_argument("--batch", type=list_of(positive), default=[1], metavar="N,N", help="batch sizes (default 1)")
    command.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="number of timed prefills of each cache (default 3)"
    )
    command.add_argument("--plot", metavar="FILE", help="draw the results, as .png, .svg, .pdf, ... (needs matplotlib)")
    command.add_argument("--steps", type=positive, default=48, metavar="N", help="decode steps of each cache (default 48)")
    add_model(command)
    add_threads_and_json(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..evaluation import bench, charts, loading, machine, packages

    packages.require("rich")
    from ..evaluation import tables

    set_threads(options)
    check_writable(options.json)
    if options.plot is not None:
        charts.check(options.plot)
    with tables.progress_bar() as progress:
        loaded = loading.load(options.model, dtype=options.dtype, device=options.device)
        others = machine.Others()
        records = bench.run(
            loaded.model,
            loaded.tokenizer,
            prompt_tokens=options.prompt_tokens,
            methods=options.methods,
            budget=options.budget,
            batches=options.batch,
            repeats=options.repeats,
            steps=options.steps,
            progress=progress,
        )
        appended = bench.append_times(loaded.model)
        used_by_others = others.cores()
    targets = bench.targets(records, options.budget)
    console = tables.Console()
    print_model(console, loaded, f"budget {options.budget}")
    tables.benchmark(console, records)
    tables.appends(console, appended)
    tables.targets(console, targets)
    tables.warning(console, machine.crowded(used_by_others))
    write_json(options, loaded, {"runs": records, "append": appended, "targets": targets}, used_by_others)
    if options.plot is not None:
        charts.bench(records, options.plot, f"{loaded.name}, budget {options.budget}, {loaded.model.device}")
