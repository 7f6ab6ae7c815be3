"""``mixkv eval``: quality on many samples."""

from __future__ import annotations

import argparse
from functools import partial

from .arguments import add_grid, add_model, add_threads_and_json, configs, list_of, method_and_score, natural, positive
from .results import print_model, set_threads, write_json


def add_parser(commands) -> None:
    command = commands.add_parser("eval", help="quality: compressed caches against the full cache on many samples")
    command.add_argument(
        "--task",
        type=list_of(str),
        default=["needle", "codes", "lookup", "prose", "several"],
        metavar="NAME,NAME",
        help="default needle,codes,lookup,prose,several; of pages: form, table, receipt, screen, two-pages, each also with -later",
    )
    command.add_argument(
        "--variant",
        default="fresh",
        metavar="NAME",
        help="for pages: fresh, or something that the document model was not trained with: words, phrasing, layout, font "
        "(default fresh)",
    )
    command.add_argument(
        "--keys",
        type=list_of(positive),
        default=[2, 3, 4],
        metavar="N,N",
        help="for pages: how many values a question asks for, drawn from these numbers (default 2,3,4)",
    )
    command.add_argument("--data", metavar="FILE", help="JSON lines with context, question and answer, instead of --task")
    command.add_argument(
        "--tokens", type=list_of(positive), default=[1024], metavar="N,N", help="lengths of the texts (default 1024)"
    )
    command.add_argument(
        "--samples", type=positive, default=20, metavar="N", help="samples for each task and length (default 20)"
    )
    command.add_argument("--first-seed", type=natural, default=0, metavar="N", help="seed of the first sample (default 0)")
    command.add_argument(
        "--seed-step",
        type=positive,
        default=1,
        metavar="N",
        help="difference between seeds; 2 uses one half of the prose only (default 1)",
    )
    command.add_argument("--answer-tokens", type=positive, default=16, metavar="N", help="longest answer (default 16)")
    command.add_argument(
        "--reference",
        type=method_and_score,
        default=("snapkv", "mix"),
        metavar="METHOD+SCORE",
        help="the cache that the others are compared with (default snapkv+mix)",
    )
    command.add_argument("--out", metavar="FILE", help="write each sample to this file when it is finished (JSON lines)")
    command.add_argument("--resume", action="store_true", help="continue with the samples that are missing in --out")
    add_grid(command, ["snapkv", "adakv", "global"], ["attn", "mix", "mix-output"])
    add_model(command)
    add_threads_and_json(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..evaluation import evaluate, loading, machine, packages, pages, paired, spread

    packages.require("rich")
    from ..evaluation import tables

    set_threads(options)
    _check(options)
    vision = not options.data and any(name in pages.TASKS for name in options.task)
    if vision:
        packages.require(*packages.PAGES, remedy=packages.INSTALL_PAGES)
    caches = configs(options)
    with tables.progress_bar() as progress:
        loaded = loading.load(options.model, dtype=options.dtype, device=options.device, vision=vision)
        samples = _samples(options, loaded)
        header = {
            "model": loaded.name,
            "dtype": str(loaded.model.dtype),
            "answer_tokens": options.answer_tokens,
            "data": options.data,
            **({"variant": options.variant, "keys": options.keys} if vision else {}),
            "configs": [config.to_dict() for config in caches],
            "machine": machine.describe(loaded.model.device),
            "versions": machine.versions(),
        }
        book = spread.Book(options.out, header, resume=options.resume)
        records = spread.carry_out(
            book,
            samples,
            lambda mine: evaluate.run(
                loaded.model, loaded.tokenizer, mine, caches, answer_tokens=options.answer_tokens, progress=progress
            ),
        )
    if records is None:
        return
    rows = paired.summary(records, header["configs"], options.reference)
    console = tables.Console()
    print_model(console, loaded)
    tables.evaluation(console, rows, options.reference)
    write_json(options, loaded, {"summary": rows, "records": records, "configs": header["configs"]})


def _check(options: argparse.Namespace) -> None:
    from ..evaluation import InputError, pages, tasks

    known = {**tasks.TASKS, **pages.TASKS}
    unknown = [name for name in options.task if name not in known]
    if unknown and not options.data:
        raise InputError(f"unknown --task {unknown[0]!r}; choose from {', '.join(known)}")
    if options.variant not in pages.VARIANTS:
        raise InputError(f"unknown --variant {options.variant!r}; choose from {', '.join(pages.VARIANTS)}")


def _samples(options: argparse.Namespace, loaded) -> list[tuple]:
    """The name of each sample, and the function that makes it."""
    from ..evaluation import pages, tasks

    if options.data:
        found = tasks.from_file(loaded.tokenizer, options.data)
        return [(("file", len(sample.context), number), partial(lambda s: s, sample)) for number, sample in enumerate(found)]
    seeds = range(options.first_seed, options.first_seed + options.seed_step * options.samples, options.seed_step)
    texts = [
        ((task, tokens, seed), partial(tasks.TASKS[task], loaded.tokenizer, tokens, seed))
        for seed in seeds
        for tokens in options.tokens
        for task in options.task
        if task in tasks.TASKS
    ]
    # --tokens does not apply: the length of a page is given by its image.
    return texts + [
        ((task, 0, seed), partial(pages.TASKS[task], loaded, seed, variant=options.variant, keys=options.keys))
        for seed in seeds
        for task in options.task
        if task in pages.TASKS
    ]
