"""``mixkv compare``: one text and a question, under the full cache and compressed ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from .arguments import add_grid, add_model, add_threads_and_json, configs, positive
from .results import check_writable, print_model, set_threads, write_json


def add_parser(commands) -> None:
    command = commands.add_parser("compare", help="the comparison of demo, for a model and a text of your own")
    command.add_argument("--prompt-file", required=True, metavar="FILE", help="UTF-8 text")
    command.add_argument("--question", metavar="TEXT", help="appended to the text")
    add_grid(command, ["snapkv", "adakv", "global"], ["attn", "mix-output"])
    command.add_argument("--max-new-tokens", type=positive, default=48, metavar="N", help="longest answer (default 48)")
    command.add_argument("--no-chat", action="store_true", help="give the text as it is, without the chat template")
    command.add_argument(
        "--repeats", type=positive, default=2, metavar="N", help="number of timed prefills of each cache (default 2)"
    )
    add_model(command)
    add_threads_and_json(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..evaluation import prompts

    prompt = prompts.read(options.prompt_file, options.question)
    print_comparison(options, partial(encode_text, options, prompt), configs(options))


def encode_text(options: argparse.Namespace, prompt, loaded):
    """The `prompts.Reading` of a `prompts.Prompt`, for the loaded model."""
    from ..evaluation import prompts

    return prompts.Reading(prompts.encode(loaded.tokenizer, prompt, chat=not options.no_chat), prompt.question)


def print_comparison(options: argparse.Namespace, encode: Callable, configs: list, *, vision: bool = False) -> tuple:
    """Runs `evaluation.compare`, prints its tables and writes them to ``--json``.

    Args:
        encode: ``encode(loaded)`` gives the `prompts.Reading` that all caches are given.
        vision: whether to load a vision-language model.

    Returns: the loaded model and the reading.
    """
    from ..evaluation import compare, loading, machine, packages

    packages.require("rich")
    from ..evaluation import tables

    set_threads(options)
    check_writable(options.json)
    with tables.progress_bar() as progress:
        loaded = loading.load(options.model, dtype=options.dtype, device=options.device, vision=vision)
        reading = encode(loaded)
        others = machine.Others()
        records = compare.run(
            loaded.model,
            loaded.tokenizer,
            reading.input_ids,
            configs,
            inputs=reading.inputs,
            max_new_tokens=options.max_new_tokens,
            repeats=options.repeats,
            progress=progress,
        )
        used_by_others = others.cores()
    console = tables.Console()
    print_model(console, loaded)
    if reading.question:
        console.print(f"Question: {reading.question}")
    tables.comparison(console, records)
    tables.warning(console, machine.crowded(used_by_others))
    write_json(options, loaded, {"runs": records, "configs": [config.to_dict() for config in configs]}, used_by_others)
    return loaded, reading
