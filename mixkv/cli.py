"""The command line: mixkv demo, compare, bench, info."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Returns its exit status: 0, or 2 for what cannot be done, told in one line."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except ValueError as error:
        print(f"mixkv: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"mixkv: the package {error.name} is missing: pip install 'mixkv[demo]'", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mixkv", description="A compressed KV cache for transformers.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="SmolLM2 reads a long text and answers a question, with full and compressed caches")
    demo.add_argument("--all", action="store_true", help="every method, every score, budgets 64, 128 and 256")
    demo.add_argument("--tokens", type=_positive, default=1500, help="length of the text (default 1500)")
    _add_common(demo)
    demo.set_defaults(run=_demo, model=None, dtype="float32", device="cpu")

    compare = commands.add_parser("compare", help="the same with your own model and text")
    compare.add_argument("--model", help="Hugging Face id or folder (default: SmolLM2-135M-Instruct)")
    compare.add_argument("--prompt-file", required=True, help="UTF-8 text")
    compare.add_argument("--question", help="asked after the text")
    compare.add_argument(
        "--budget", type=_numbers, default=[64, 128], help="rows per head, or shares such as 0.1; comma-separated"
    )
    compare.add_argument("--method", type=_names, default=["snapkv", "adakv"])
    compare.add_argument("--score", type=_names, default=["attn", "mix"])
    compare.add_argument("--profile", help="JSON file of head scores, for --method sparsemm")
    compare.add_argument("--dtype", default="float32")
    compare.add_argument("--device", default="cpu")
    _add_common(compare)
    compare.set_defaults(run=_compare)

    bench = commands.add_parser("bench", help="prefill, decode step and bytes against the full cache")
    bench.add_argument("--model", help="Hugging Face id or folder (default: SmolLM2-135M-Instruct)")
    bench.add_argument("--prompt-tokens", type=_counts, default=[1024, 4096])
    bench.add_argument("--budget", type=_positive, default=128)
    bench.add_argument("--method", type=_names, default=["adakv", "snapkv", "pyramidkv", "sparsemm"])
    bench.add_argument("--score", default="mix")
    bench.add_argument("--batch", type=_positive, default=1)
    bench.add_argument("--repeats", type=_positive, default=3, help="prefills of each kind")
    bench.add_argument("--rounds", type=_positive, default=40, help="decode steps of each kind")
    bench.add_argument("--threads", type=_positive)
    bench.add_argument("--dtype", default="float32")
    bench.add_argument("--device", default="cpu")
    bench.add_argument("--json", help="write the results to this file")
    bench.set_defaults(run=_bench)

    info = commands.add_parser("info", help="versions, and what runs the operations")
    info.set_defaults(run=_info)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=_positive, default=32)
    parser.add_argument("--json", help="write the results to this file")


def _demo(given: argparse.Namespace) -> None:
    from .config import SCORES
    from .evaluation import compare, models, prompts

    model, tokenizer = models.load(None)
    text = prompts.manual(tokenizer, given.tokens)
    if given.all:
        configs = compare.grid(["snapkv", "pyramidkv", "adakv"], list(SCORES), [64, 128, 256])
        layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
        configs += compare.grid(["sparsemm"], list(SCORES), [64, 128, 256], profile=_slope(layers, heads))
    else:
        configs = compare.grid(["snapkv", "adakv"], ["attn", "mix"], [64, 128])
    _compare_and_show(given, model, tokenizer, text, prompts.QUESTION, configs)
    if given.all:
        print("sparsemm ran with a made-up head profile: none is measured for this model")


def _compare(given: argparse.Namespace) -> None:
    from .evaluation import compare, models, prompts

    text = prompts.read(given.prompt_file)
    options = {"profile": given.profile} if given.profile else {}
    configs = compare.grid(given.method, given.score, given.budget, **options)
    model, tokenizer = models.load(given.model, given.dtype, given.device)
    _compare_and_show(given, model, tokenizer, text, given.question, configs)


def _compare_and_show(given, model, tokenizer, text, question, configs) -> None:
    from .evaluation import compare, prompts, tables

    ids = prompts.encode(tokenizer, text, question, room=given.max_new_tokens, limit=prompts.context_length(model))
    print(f"{ids.shape[1]} tokens of prompt; question: {question}" if question else f"{ids.shape[1]} tokens of prompt")
    with tables.progress() as report:
        records = compare.run(model, tokenizer, ids, configs, max_new_tokens=given.max_new_tokens, progress=report)
    tables.comparison(records)
    settings = {"model": given.model or "SmolLM2-135M-Instruct", "prompt_tokens": ids.shape[1], "question": question}
    _write(given.json, {"machine": tables.machine(), "settings": settings, "results": records})


def _bench(given: argparse.Namespace) -> None:
    import torch

    from .config import MixKVConfig
    from .evaluation import bench, models, prompts, tables

    if given.threads:
        torch.set_num_threads(given.threads)
    model, tokenizer = models.load(given.model, given.dtype, given.device)
    text = model.config.get_text_config(decoder=True)
    heads = text.num_key_value_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    profile = _slope(text.num_hidden_layers, heads) if "sparsemm" in given.method else None
    configs = [MixKVConfig(method=name, score=given.score, budget=given.budget, profile=profile) for name in given.method]
    longest = max(given.prompt_tokens)
    limit = prompts.context_length(model)
    if limit is not None and longest + given.rounds + 2 > limit:
        raise ValueError(f"{longest} prompt tokens and {given.rounds} steps do not fit the model's context of {limit}")
    ids = tokenizer(prompts.manual(tokenizer, longest), return_tensors="pt").input_ids[:, :longest]
    with tables.progress() as report:
        records = bench.run(
            model,
            ids,
            given.prompt_tokens,
            configs,
            batch=given.batch,
            repeats=given.repeats,
            rounds=given.rounds,
            progress=report,
        )
    append = bench.append_cost(heads, size)
    goals = bench.targets(records, given.budget)
    tables.benchmark(records, append, goals)
    settings = {name: value for name, value in vars(given).items() if name not in ("run", "json")}
    results = {"results": records, "append": append, "targets": goals}
    _write(given.json, {"machine": tables.machine(), "settings": settings, **results})


def _info(given: argparse.Namespace) -> None:
    import platform

    import torch
    import transformers

    from . import __version__, kernels

    print(
        f"mixkv {__version__}, Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(
        f"{torch.get_num_threads()} CPU threads; GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}"
    )
    for line in kernels.report():
        print(line)


def _slope(layers: int, heads: int) -> list[list[float]]:
    """A made-up head profile, uneven, for timing."""
    return [[1.0 + (layer * heads + head) % 5 for head in range(heads)] for layer in range(layers)]


def _write(path: str | None, content: dict) -> None:
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    print(f"written: {path}")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_positive(part) for part in _names(text)]


def _numbers(text: str) -> list[int | float]:
    try:
        return [float(part) if "." in part else int(part) for part in _names(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from error
