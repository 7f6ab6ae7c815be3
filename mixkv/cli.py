"""The command line: arguments in, exit code out (0; 2 for bad input). What it runs is in `mixkv.evaluation`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

# torch and transformers are imported by the commands, not here: they take seconds, and --help needs neither.


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; see ``mixkv --help``."""
    options = _parser().parse_args(arguments)
    from .evaluation import InputError

    try:
        options.run(options)
    except InputError as error:
        print(f"mixkv {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _demo(options: argparse.Namespace) -> None:
    from .evaluation import compare, loading, packages, prompts
    from .registry import METHODS, SCORES

    packages.require(*packages.PACKAGES, "rich")
    if options.vision:
        _vision_demo(options)
        return
    if options.all:
        print(
            "sparsemm is left out: it needs a head profile of the model; with one: mixkv compare --method sparsemm --profile FILE"
        )
        configs = compare.grid(list(product([method for method in METHODS if method != "sparsemm"], SCORES)), [64, 128, 256])
    else:
        kinds = [("snapkv", "attn"), ("adakv", "mix"), ("adakv", "mix-output"), ("global", "mix-output")]
        configs = [config for kind in kinds for config in compare.grid([kind], [64, 128])]
    _comparison(options, partial(_text, options, prompts.demo()), configs)


def _vision_demo(options: argparse.Namespace) -> None:
    from .evaluation import charts, compare, loading, packages, pages

    packages.require(*packages.PAGES, remedy=packages.INSTALL_PAGES)
    charts.check(options.picture, "--picture")
    kinds = [("snapkv", "attn"), ("snapkv", "mix"), ("global", "mix-output")]
    configs = [config for kind in kinds for config in compare.grid([kind], [48, 96])]
    shown = [config for config in configs if config.budget == 48]
    loaded, reading = _comparison(options, pages.demo, configs, vision=True)
    charts.patches(loaded.model, reading, shown, options.picture)
    print(f"What each cache still holds of the page, the darker the fewer heads: {options.picture}")


def _grid(options: argparse.Namespace) -> list:
    from .evaluation import compare

    profile = {"profile": options.profile} if options.profile else {}
    kinds = options.cache or list(product(options.method, options.score))
    return compare.grid(kinds, options.budget, **profile)


def _compare(options: argparse.Namespace) -> None:
    from .evaluation import prompts

    _comparison(options, partial(_text, options, prompts.read(options.prompt_file, options.question)), _grid(options))


def _text(options: argparse.Namespace, prompt, loaded):
    from .evaluation import prompts

    return prompts.Reading(prompts.encode(loaded.tokenizer, prompt, chat=not options.no_chat), prompt.question)


def _comparison(options: argparse.Namespace, make: Callable, configs: list, *, vision: bool = False) -> tuple:
    """Prints and writes the comparison on what ``make(loaded)`` gives to read; returns the loaded model and the reading."""
    from .evaluation import compare, machine, loading, packages

    packages.require("rich")
    from .evaluation import tables

    _set_threads(options)
    _check_writable(options.json)
    with tables.progress_bar() as progress:
        loaded = loading.load(options.model, dtype=options.dtype, device=options.device, vision=vision)
        reading = make(loaded)
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
    console.print(f"{loaded.name}, {loaded.model.dtype}, {loaded.model.device}", style="dim")
    if reading.question:
        console.print(f"Question: {reading.question}")
    tables.comparison(console, records)
    tables.warning(console, machine.crowded(used_by_others))
    _write(options, loaded, used_by_others, {"runs": records, "configs": [config.to_dict() for config in configs]})
    return loaded, reading


def _bench(options: argparse.Namespace) -> None:
    from .evaluation import bench, charts, machine, loading, packages

    packages.require("rich")
    from .evaluation import tables

    _set_threads(options)
    _check_writable(options.json)
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
    found = bench.targets(records, options.budget)
    console = tables.Console()
    console.print(f"{loaded.name}, {loaded.model.dtype}, {loaded.model.device}, budget {options.budget}", style="dim")
    tables.benchmark(console, records)
    tables.appends(console, appended)
    tables.targets(console, found)
    tables.warning(console, machine.crowded(used_by_others))
    _write(options, loaded, used_by_others, {"runs": records, "append": appended, "targets": found})
    if options.plot is not None:
        charts.bench(records, options.plot, f"{loaded.name}, budget {options.budget}, {loaded.model.device}")


def _eval(options: argparse.Namespace) -> None:
    from .evaluation import InputError, evaluate, machine, loading, packages, pages, paired, spread, tasks

    packages.require("rich")
    from .evaluation import tables

    _set_threads(options)
    known = {**tasks.TASKS, **pages.TASKS}
    unknown = [name for name in options.task if name not in known]
    if unknown and not options.data:
        raise InputError(f"unknown --task {unknown[0]!r}; choose from {', '.join(known)}")
    vision = not options.data and any(name in pages.TASKS for name in options.task)
    if options.variant not in pages.VARIANTS:
        raise InputError(f"unknown --variant {options.variant!r}; choose from {', '.join(pages.VARIANTS)}")
    if vision:
        packages.require(*packages.PAGES, remedy=packages.INSTALL_PAGES)
    configs = _grid(options)
    with tables.progress_bar() as progress:
        loaded = loading.load(options.model, dtype=options.dtype, device=options.device, vision=vision)
        samples = _samples(options, loaded)
        header = {
            "model": loaded.name,
            "dtype": str(loaded.model.dtype),
            "answer_tokens": options.answer_tokens,
            "data": options.data,
            **({"variant": options.variant, "keys": options.keys} if vision else {}),
            "configs": [config.to_dict() for config in configs],
            "machine": machine.describe(loaded.model.device),
            "versions": machine.versions(),
        }
        book = spread.Book(options.out, header, resume=options.resume)
        records = spread.carry_out(
            book,
            samples,
            lambda mine: evaluate.run(
                loaded.model, loaded.tokenizer, mine, configs, answer_tokens=options.answer_tokens, progress=progress
            ),
        )
    if records is None:
        return
    rows = paired.summary(records, header["configs"], options.reference)
    console = tables.Console()
    console.print(f"{loaded.name}, {loaded.model.dtype}, {loaded.model.device}", style="dim")
    tables.evaluation(console, rows, options.reference)
    _write(options, loaded, None, {"summary": rows, "records": records, "configs": header["configs"]})


def _samples(options: argparse.Namespace, loaded) -> list[tuple]:
    """Names of samples, and how each is made."""
    from .evaluation import pages, tasks

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
    # A page's length is its own: no --tokens.
    return texts + [
        ((task, 0, seed), partial(pages.TASKS[task], loaded, seed, variant=options.variant, keys=options.keys))
        for seed in seeds
        for task in options.task
        if task in pages.TASKS
    ]


def _calibrate(options: argparse.Namespace) -> None:
    from . import head_profile
    from .evaluation import InputError, boxes, calibrate, machine, loading, packages, spans, spread

    texts = all(kind in spans.KINDS for kind in options.kind)
    if texts:
        packages.require("rich")
    else:
        packages.require("rich", *packages.PAGES, remedy=packages.INSTALL_PAGES)
    from .evaluation import tables

    _set_threads(options)
    _check_writable(options.out, "--out")
    if Path(options.out).suffix not in (head_profile.CHECKED, ".json"):
        raise InputError(f"--out {options.out} must end in {head_profile.CHECKED} or .json")
    if Path(options.out).exists() and not options.resume:
        raise InputError(f"--out {options.out} exists: add pages to it with --resume, or name another file")
    unknown = [kind for kind in options.kind if kind not in boxes.KINDS and not texts]
    if unknown:
        raise InputError(
            f"--kind {unknown[0]!r} is none of the pages on which answers stand; choose from {', '.join(boxes.KINDS)}, or all "
            f"from texts: {', '.join(spans.KINDS)}"
        )
    with tables.progress_bar() as progress:
        loaded = loading.load(options.model, dtype=options.dtype, device=options.device, vision=not texts)
        layers, heads = calibrate.shape(loaded)
        about = {"name": loaded.name, "dtype": str(loaded.model.dtype), "versions": machine.versions()}
        book = spread.Book(f"{options.out}.jsonl", {**about, "layers": layers, "heads": heads}, resume=options.resume)
        pages = []
        for index in range(options.pages):
            turn, place = divmod(index, len(options.kind))
            kind, seed = options.kind[place], options.first_seed + turn * options.seed_step
            if texts:
                pages.append(((kind, options.tokens, seed), partial(spans.align, loaded, kind, options.tokens, seed)))
            else:
                pages.append(((kind, 0, seed), partial(_boxed, loaded, kind, seed)))
        records = spread.carry_out(book, pages, lambda mine: calibrate.run(loaded, mine, progress=progress))
    if records is None:
        return
    profile = calibrate.profile(loaded, records)
    counts = {"pages": len(records), **{name: sum(record[name] for record in records) for name in ("boxed", "right")}}
    head_profile.save(profile, options.out, profile.model, {**about, **counts, "kinds": options.kind})
    console = tables.Console()
    console.print(f"{loaded.name}, {loaded.model.dtype}, {loaded.model.device}", style="dim")
    tables.heads(console, profile, counts)
    console.print(f'Written: {options.out}, for method="sparsemm", profile="{options.out}"')


def _boxed(loaded, kind: str, seed: int):
    from .evaluation import boxes

    return boxes.align(loaded, boxes.make(kind, seed, terse=not loaded.knows_pages))


def _info(options: argparse.Namespace) -> None:
    from .evaluation import machine, smollm2
    from .ops import dispatch

    for name, value in {**machine.versions(), **machine.describe(), "cache folder": smollm2.cache_folder()}.items():
        print(f"{name:<14}{'none' if value is None else value}")
    for line in dispatch.report():
        print(line)


def _set_threads(options: argparse.Namespace) -> None:
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)


def _check_writable(path: str | None, option: str = "--json") -> None:
    """Before minutes of work, not after them."""
    from .evaluation import InputError

    if path is not None and not Path(path).resolve().parent.is_dir():
        raise InputError(f"{option} {path} cannot be written: there is no folder {Path(path).resolve().parent}")


def _write(options: argparse.Namespace, loaded, used_by_others: float | None, results: dict[str, Any]) -> None:
    if options.json is None:
        return
    from .evaluation import InputError, machine

    settings = {name: value for name, value in vars(options).items() if name != "run"}
    settings.update(model=loaded.name, dtype=str(loaded.model.dtype), device=str(loaded.model.device))
    described = {**machine.describe(loaded.model.device), "cores_used_by_others": used_by_others}
    report = {"machine": described, "versions": machine.versions(), "settings": settings, **results}
    try:
        Path(options.json).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {options.json} cannot be written: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixkv", description="A compressed KV cache for transformers: see it, compare it, time it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser("demo", help="a long text and a question: the full cache against compressed ones, on SmolLM2")
    demo.add_argument(
        "--all", action="store_true", help="every method and score, budgets 64, 128 and 256 (takes a quarter of an hour)"
    )
    _add_common(demo)
    demo.add_argument("--vision", action="store_true", help="a page and a question about it, on the small document model")
    demo.add_argument(
        "--picture",
        default="mixkv-demo.png",
        metavar="FILE",
        help="of --vision: the page with what is kept (default mixkv-demo.png)",
    )
    demo.set_defaults(run=_demo, model=None, dtype="auto", device=None, no_chat=False, repeats=2, max_new_tokens=48)

    compare = commands.add_parser("compare", help="the same for your own model and text")
    compare.add_argument("--prompt-file", required=True, metavar="FILE", help="UTF-8 text")
    compare.add_argument("--question", metavar="TEXT", help="asked after the text")
    _add_grid(compare, ["snapkv", "adakv", "global"], ["attn", "mix-output"])
    compare.add_argument("--max-new-tokens", type=_positive, default=48, metavar="N", help="longest answer (default 48)")
    compare.add_argument("--no-chat", action="store_true", help="give the text as it is, without the chat template")
    compare.add_argument("--repeats", type=_positive, default=2, metavar="N", help="how often the prompt is read (default 2)")
    _add_model(compare)
    _add_common(compare)
    compare.set_defaults(run=_compare)

    bench = commands.add_parser("bench", help="time and memory of every method against the full cache")
    bench.add_argument("--prompt-tokens", type=_list(_positive), default=[1024, 4096], metavar="N,N", help="default 1024,4096")
    bench.add_argument("--budget", type=_positive, default=128, metavar="N", help="rows a KV head (default 128)")
    bench.add_argument(
        "--methods",
        type=_list(str),
        default=["snapkv", "pyramidkv", "adakv", "sparsemm", "global+mix-output"],
        metavar="NAME,NAME",
        help="methods, with score mix, or METHOD+SCORE (default: all)",
    )
    bench.add_argument("--batch", type=_list(_positive), default=[1], metavar="N,N", help="rows in a batch (default 1)")
    bench.add_argument("--repeats", type=_positive, default=3, metavar="N", help="how often each prompt is read (default 3)")
    bench.add_argument("--plot", metavar="FILE", help="draw the results there, as .png, .svg, .pdf, ... (needs matplotlib)")
    bench.add_argument("--steps", type=_positive, default=48, metavar="N", help="decode steps of each cache (default 48)")
    _add_model(bench)
    _add_common(bench)
    bench.set_defaults(run=_bench)

    evaluation = commands.add_parser("eval", help="quality: every method against the full cache on many samples")
    evaluation.add_argument(
        "--task",
        type=_list(str),
        default=["needle", "codes", "lookup", "prose", "several"],
        metavar="NAME,NAME",
        help="default: all",
    )
    evaluation.add_argument(
        "--variant",
        default="fresh",
        metavar="NAME",
        help="of pages: fresh, or what the document model was never trained with: words, phrasing, layout, font (default fresh)",
    )
    evaluation.add_argument(
        "--keys",
        type=_list(_positive),
        default=[2, 3, 4],
        metavar="N,N",
        help="of pages: how many things a question asks for, one of these numbers (default 2,3,4)",
    )
    evaluation.add_argument("--data", metavar="FILE", help="JSON lines with context, question, answer, in place of --task")
    evaluation.add_argument("--tokens", type=_list(_positive), default=[1024], metavar="N,N", help="lengths (default 1024)")
    evaluation.add_argument("--samples", type=_positive, default=20, metavar="N", help="of each task and length (default 20)")
    evaluation.add_argument("--first-seed", type=_natural, default=0, metavar="N", help="of the first sample (default 0)")
    evaluation.add_argument(
        "--seed-step", type=_positive, default=1, metavar="N", help="2: one half of the texts only (default 1)"
    )
    evaluation.add_argument("--answer-tokens", type=_positive, default=16, metavar="N", help="longest answer (default 16)")
    evaluation.add_argument(
        "--reference",
        type=_kind,
        default=("snapkv", "mix"),
        metavar="METHOD+SCORE",
        help="compared with (default snapkv+mix)",
    )
    evaluation.add_argument("--out", metavar="FILE", help="samples are written there as they are finished (JSON lines)")
    evaluation.add_argument("--resume", action="store_true", help="go on with the samples that --out lacks")
    _add_grid(evaluation, ["snapkv", "adakv", "global"], ["attn", "mix", "mix-output"])
    _add_model(evaluation)
    _add_common(evaluation)
    evaluation.set_defaults(run=_eval)

    calibrate = commands.add_parser("calibrate", help="the head profile that method sparsemm needs, measured on pages or texts")
    calibrate.add_argument(
        "--out", required=True, metavar="FILE", help=".safetensors, or .json; the pages read are kept beside it, in FILE.jsonl"
    )
    calibrate.add_argument("--pages", type=_positive, default=100, metavar="N", help="pages, or texts (default 100)")
    calibrate.add_argument(
        "--kind",
        type=_list(str),
        default=["form", "table", "receipt"],
        metavar="NAME,NAME",
        help="of pages, in turn: form, table, receipt, two-pages (default form,table,receipt); of texts: codes, lookup, several",
    )
    calibrate.add_argument("--tokens", type=_positive, default=1024, metavar="N", help="length of texts (default 1024)")
    calibrate.add_argument("--first-seed", type=_natural, default=0, metavar="N", help="of the first page (default 0)")
    calibrate.add_argument(
        "--seed-step", type=_positive, default=1, metavar="N", help="2: one half of the texts only (default 1)"
    )
    calibrate.add_argument("--resume", action="store_true", help="go on with the pages that FILE.jsonl lacks")
    _add_model(calibrate, "the small document model; for texts SmolLM2-135M-Instruct")
    _add_threads(calibrate)
    calibrate.set_defaults(run=_calibrate)

    info = commands.add_parser("info", help="versions, machine, and what would be used")
    info.set_defaults(run=_info)
    return parser


def _add_grid(parser: argparse.ArgumentParser, methods: list[str], scores: list[str]) -> None:
    """Every method with every score and budget."""
    parser.add_argument(
        "--budget",
        type=_list(_number),
        default=[64, 128],
        metavar="N,N",
        help="rows a KV head, or shares in (0, 1] (default 64,128)",
    )
    for name, default in (("method", methods), ("score", scores)):
        parser.add_argument(
            f"--{name}", type=_list(str), default=default, metavar="NAME,NAME", help=f"default {','.join(default)}"
        )
    parser.add_argument(
        "--cache",
        type=_list(_kind),
        metavar="METHOD+SCORE,...",
        help="these methods each with its score, in place of every --method with every --score",
    )
    parser.add_argument("--profile", metavar="FILE", help="head profile for sparsemm, from mixkv calibrate or as JSON")


def _add_model(parser: argparse.ArgumentParser, default: str = "SmolLM2-135M-Instruct") -> None:
    parser.add_argument("--model", metavar="ID", help=f"Hugging Face id or folder (default: {default})")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", help="torch device (default: the GPU if there is one)")


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads of torch")


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_threads(parser)
    parser.add_argument("--json", metavar="FILE", help="write the results there")


def _kind(text: str) -> tuple[str, str]:
    method, plus, score = text.partition("+")
    if not plus:
        raise argparse.ArgumentTypeError(f"{text!r} is not METHOD+SCORE, as snapkv+mix is")
    return method, score


def _list(item: Callable[[str], Any]) -> Callable[[str], list]:
    def parse(text: str) -> list:
        return [item(part.strip()) for part in text.split(",") if part.strip()] or [item(text)]

    parse.__name__ = f"{item.__name__.strip('_')} list"
    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _number(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of rows, like 128, nor a share, like 0.1") from None
