"""``mixkv calibrate``: measures a head profile, or fits a gate."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from .arguments import add_model, add_threads, list_of, natural, positive
from .results import check_writable, print_model, set_threads


def add_parser(commands) -> None:
    command = commands.add_parser(
        "calibrate", help="measure the head profile that method sparsemm needs, or fit the gate of score gate"
    )
    command.add_argument("--gate", action="store_true", help="fit a gate for score gate, instead of a head profile")
    command.add_argument(
        "--out",
        metavar="FILE",
        help=".safetensors or .json; the measurements of each page are written to FILE.jsonl beside it; with --gate .safetensors "
        "(default in mixkv's cache folder)",
    )
    command.add_argument("--pages", type=positive, metavar="N", help="number of pages or texts (default 100; with --gate 8)")
    command.add_argument(
        "--kind",
        type=list_of(str),
        metavar="NAME,NAME",
        help="kinds of pages, in turn: form, table, receipt, two-pages (default form,table,receipt); or of texts: codes, "
        "lookup, several; with --gate any task of mixkv eval (default prose)",
    )
    command.add_argument("--tokens", type=positive, default=1024, metavar="N", help="length of texts (default 1024)")
    command.add_argument("--first-seed", type=natural, default=0, metavar="N", help="seed of the first page (default 0)")
    command.add_argument(
        "--seed-step",
        type=positive,
        default=1,
        metavar="N",
        help="difference between seeds; 2 uses one half of the prose only (default 1)",
    )
    command.add_argument("--resume", action="store_true", help="continue with the pages that are missing in FILE.jsonl")
    add_model(command, "the small document model; for texts SmolLM2-135M-Instruct")
    add_threads(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.gate:
        _fit_gate(options)
    else:
        _measure_profile(options)


def _fit_gate(options: argparse.Namespace) -> None:
    from .. import calibrate
    from ..evaluation import InputError, gate_samples, loading, packages
    from ..evaluation import pages as page_tasks

    kinds = options.kind or ["prose"]
    vision = any(kind in page_tasks.TASKS for kind in kinds)
    packages.require("rich", *(packages.PAGES if vision else ()))
    from ..evaluation import tables

    set_threads(options)
    check_writable(options.out, "--out")
    if options.out and Path(options.out).suffix != ".safetensors":
        raise InputError(f"--out {options.out} must end in .safetensors")
    seeds = {"first_seed": options.first_seed, "seed_step": options.seed_step}
    with tables.progress_bar() as progress:
        loaded = loading.load(options.model, dtype=options.dtype, device=options.device, vision=vision)
        inputs = gate_samples.inputs(loaded, kinds, options.pages or 8, tokens=options.tokens, **seeds, progress=progress)
        try:
            path = calibrate(loaded.model, inputs, out=options.out)
        except ValueError as error:
            raise InputError(str(error)) from error
    console = tables.Console()
    print_model(console, loaded)
    console.print(f'Written: {path}, for score="gate", gate="{path}"' if options.out else f'Written: {path}, for score="gate"')


def _measure_profile(options: argparse.Namespace) -> None:
    from .. import head_profile
    from ..evaluation import calibrate, loading, machine, packages, spans, spread

    options.pages, options.kind = options.pages or 100, options.kind or ["form", "table", "receipt"]
    texts = all(kind in spans.KINDS for kind in options.kind)
    if texts:
        packages.require("rich")
    else:
        packages.require("rich", *packages.PAGES, remedy=packages.INSTALL_PAGES)
    from ..evaluation import tables

    set_threads(options)
    _check(options, texts)
    with tables.progress_bar() as progress:
        loaded = loading.load(options.model, dtype=options.dtype, device=options.device, vision=not texts)
        layers, heads = calibrate.shape(loaded)
        about = {"name": loaded.name, "dtype": str(loaded.model.dtype), "versions": machine.versions()}
        book = spread.Book(f"{options.out}.jsonl", {**about, "layers": layers, "heads": heads}, resume=options.resume)
        pages = _pages(options, loaded, texts)
        records = spread.carry_out(book, pages, lambda mine: calibrate.run(loaded, mine, progress=progress))
    if records is None:
        return
    profile = calibrate.profile(loaded, records)
    counts = {"pages": len(records), **{name: sum(record[name] for record in records) for name in ("boxed", "right")}}
    head_profile.save(profile, options.out, profile.model, {**about, **counts, "kinds": options.kind})
    console = tables.Console()
    print_model(console, loaded)
    tables.heads(console, profile, counts)
    console.print(f'Written: {options.out}, for method="sparsemm", profile="{options.out}"')


def _check(options: argparse.Namespace, texts: bool) -> None:
    from .. import head_profile
    from ..evaluation import InputError, boxes, spans

    if options.out is None:
        raise InputError("--out FILE is needed: the profile is written there")
    check_writable(options.out, "--out")
    if Path(options.out).suffix not in (head_profile.CHECKED, ".json"):
        raise InputError(f"--out {options.out} must end in {head_profile.CHECKED} or .json")
    if Path(options.out).exists() and not options.resume:
        raise InputError(f"--out {options.out} exists: add pages to it with --resume, or name another file")
    unknown = [kind for kind in options.kind if kind not in boxes.KINDS and not texts]
    if unknown:
        raise InputError(
            f"--kind {unknown[0]!r} is not a kind of page that shows its answers; choose from {', '.join(boxes.KINDS)}, or "
            f"only from texts: {', '.join(spans.KINDS)}"
        )


def _pages(options: argparse.Namespace, loaded, texts: bool) -> list[tuple]:
    """The name of each page or text, and the function that makes it."""
    from ..evaluation import spans

    pages = []
    for index in range(options.pages):
        turn, place = divmod(index, len(options.kind))
        kind, seed = options.kind[place], options.first_seed + turn * options.seed_step
        if texts:
            pages.append(((kind, options.tokens, seed), partial(spans.align, loaded, kind, options.tokens, seed)))
        else:
            pages.append(((kind, 0, seed), partial(_align_page, loaded, kind, seed)))
    return pages


def _align_page(loaded, kind: str, seed: int):
    from ..evaluation import boxes

    return boxes.align(loaded, boxes.make(kind, seed, terse=not loaded.knows_pages))
