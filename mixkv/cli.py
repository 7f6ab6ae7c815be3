"""The command line: arguments in, exit code out (0; 2 for bad input). What it runs is in `mixkv.evaluation`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
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
    from .config import METHODS, SCORES
    from .evaluation import compare, models, prompts

    models.require(*models.PACKAGES, "rich")
    if options.all:
        print(
            "sparsemm is left out: it needs a head profile of the model; with one: mixkv compare --method sparsemm --profile FILE"
        )
        configs = compare.grid([method for method in METHODS if method != "sparsemm"], list(SCORES), [64, 128, 256])
    else:
        configs = compare.grid(["snapkv", "adakv"], ["attn", "mix"], [64, 128])
    _comparison(options, prompts.demo(), configs)


def _compare(options: argparse.Namespace) -> None:
    from .evaluation import compare, prompts

    profile = {"profile": options.profile} if options.profile else {}
    configs = compare.grid(options.method, options.score, options.budget, **profile)
    _comparison(options, prompts.read(options.prompt_file, options.question), configs)


def _comparison(options: argparse.Namespace, prompt, configs: list) -> None:
    from .evaluation import compare, machine, models, prompts

    models.require("rich")
    from .evaluation import tables

    _set_threads(options)
    _check_writable(options.json)
    with tables.progress_bar() as progress:
        loaded = models.load(options.model, dtype=options.dtype, device=options.device)
        input_ids = prompts.encode(loaded.tokenizer, prompt, chat=not options.no_chat)
        others = machine.Others()
        records = compare.run(
            loaded.model,
            loaded.tokenizer,
            input_ids,
            configs,
            max_new_tokens=options.max_new_tokens,
            repeats=options.repeats,
            progress=progress,
        )
        used_by_others = others.cores()
    console = tables.Console()
    console.print(f"{loaded.name}, {loaded.model.dtype}, {loaded.model.device}", style="dim")
    if prompt.question:
        console.print(f"Question: {prompt.question}")
    tables.comparison(console, records)
    tables.warning(console, machine.crowded(used_by_others))
    _write(options, loaded, used_by_others, {"runs": records, "configs": [config.to_dict() for config in configs]})


def _bench(options: argparse.Namespace) -> None:
    from .evaluation import bench, charts, machine, models

    models.require("rich")
    from .evaluation import tables

    _set_threads(options)
    _check_writable(options.json)
    if options.plot is not None:
        charts.check(options.plot)
    with tables.progress_bar() as progress:
        loaded = models.load(options.model, dtype=options.dtype, device=options.device)
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


def _info(options: argparse.Namespace) -> None:
    from . import kernels
    from .evaluation import machine, models

    for name, value in {**machine.versions(), **machine.describe(), "cache folder": models.cache_folder()}.items():
        print(f"{name:<14}{'none' if value is None else value}")
    for line in kernels.report():
        print(line)


def _set_threads(options: argparse.Namespace) -> None:
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)


def _check_writable(path: str | None) -> None:
    """Before minutes of work, not after them."""
    from .evaluation import InputError

    if path is not None and not Path(path).resolve().parent.is_dir():
        raise InputError(f"--json {path} cannot be written: there is no folder {Path(path).resolve().parent}")


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
    demo.set_defaults(run=_demo, model=None, dtype="auto", device=None, no_chat=False, repeats=2, max_new_tokens=48)

    compare = commands.add_parser("compare", help="the same for your own model and text")
    compare.add_argument("--prompt-file", required=True, metavar="FILE", help="UTF-8 text")
    compare.add_argument("--question", metavar="TEXT", help="asked after the text")
    compare.add_argument(
        "--budget",
        type=_list(_number),
        default=[64, 128],
        metavar="N,N",
        help="rows a KV head, or shares in (0, 1] (default 64,128)",
    )
    compare.add_argument(
        "--method", type=_list(str), default=["snapkv", "adakv"], metavar="NAME,NAME", help="default snapkv,adakv"
    )
    compare.add_argument("--score", type=_list(str), default=["attn", "mix"], metavar="NAME,NAME", help="default attn,mix")
    compare.add_argument("--profile", metavar="FILE", help="head profile for sparsemm (JSON)")
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
        default=["snapkv", "pyramidkv", "adakv", "sparsemm"],
        metavar="NAME,NAME",
        help="default: all",
    )
    bench.add_argument("--batch", type=_list(_positive), default=[1], metavar="N,N", help="rows in a batch (default 1)")
    bench.add_argument("--repeats", type=_positive, default=3, metavar="N", help="how often each prompt is read (default 3)")
    bench.add_argument("--plot", metavar="FILE", help="draw the results there, as .png, .svg, .pdf, ... (needs matplotlib)")
    bench.add_argument("--steps", type=_positive, default=48, metavar="N", help="decode steps of each cache (default 48)")
    _add_model(bench)
    _add_common(bench)
    bench.set_defaults(run=_bench)

    info = commands.add_parser("info", help="versions, machine, and what would be used")
    info.set_defaults(run=_info)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="ID", help="Hugging Face id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", help="torch device (default: the GPU if there is one)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads of torch")
    parser.add_argument("--json", metavar="FILE", help="write the results there")


def _list(item: Callable[[str], Any]) -> Callable[[str], list]:
    def parse(text: str) -> list:
        return [item(part.strip()) for part in text.split(",") if part.strip()] or [item(text)]

    parse.__name__ = f"{item.__name__.strip('_')} list"
    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _number(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of rows, like 128, nor a share, like 0.1") from None
