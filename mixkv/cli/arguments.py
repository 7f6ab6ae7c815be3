"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from typing import Any

from .. import registry
from ..byte_budget import AUTO
from ..config import MixKVConfig


def add_grid(parser: argparse.ArgumentParser, methods: list[str], scores: list[str]) -> None:
    """Adds the options of `configs`, with default ``methods`` and ``scores``."""
    parser.add_argument(
        "--budget",
        type=list_of(budget),
        default=[64, 128],
        metavar="N,N",
        help="KV entries per KV head (whole numbers), or shares of the prompt in (0, 1], or bytes of a prompt's entries: 64MiB, "
        "or 10%% of the full cache's, or auto: all whose score exceeds the threshold (default 64,128)",
    )
    add_threshold(parser)
    parser.add_argument(
        "--rows",
        type=list_of(str),
        default=["full"],
        metavar="NAME,NAME",
        help=f"how entries are stored: any of {', '.join(registry.FORMATS)} (default full)",
    )
    for name, default, names in (("method", methods, registry.METHODS), ("score", scores, registry.SCORES)):
        parser.add_argument(
            f"--{name}",
            type=list_of(str),
            default=default,
            metavar="NAME,NAME",
            help=f"any of {', '.join(names)} (default {','.join(default)})",
        )
    parser.add_argument(
        "--cache",
        type=list_of(method_and_score),
        metavar="METHOD+SCORE,...",
        help="pairs of a method and a score, instead of every --method with every --score",
    )
    parser.add_argument(
        "--window",
        type=list_of(positive),
        default=[32],
        metavar="N,N",
        help="lengths of the observation window, which is always kept (default 32)",
    )
    parser.add_argument("--profile", metavar="FILE", help="head profile for sparsemm, written by mixkv calibrate or as JSON")
    parser.add_argument("--gate", metavar="FILE", help="gate for score gate, written by mixkv calibrate --gate")
    parser.add_argument(
        "--refit",
        type=list_of(yes_or_no),
        default=[False],
        metavar="no,yes",
        help="whether the values of kept entries are refitted (default no)",
    )


def configs(options: argparse.Namespace) -> list:
    """A `MixKVConfig` for every window, row format, method, score and budget of `add_grid`, with values refitted or not.

    Raises:
        InputError: a value is invalid.
    """
    from ..evaluation import compare

    given = {name: getattr(options, name) for name in ("profile", "gate", "threshold") if getattr(options, name) is not None}
    kinds = options.cache or list(product(options.method, options.score))
    forms = list(product(options.window, options.refit, options.rows))
    return [
        config
        for window, refit, rows in forms
        for config in compare.grid(kinds, options.budget, window=window, rows=rows, refit=refit, **given)
    ]


def add_threshold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help=f"of --budget auto: the score that kept KV entries exceed (default {MixKVConfig.threshold})",
    )


def add_model(parser: argparse.ArgumentParser, default: str = "SmolLM2-135M-Instruct") -> None:
    """Adds the options that `loading.load` takes; ``default`` describes the default model."""
    parser.add_argument("--model", metavar="ID", help=f"Hugging Face id or folder (default {default})")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="default auto")
    parser.add_argument("--device", help="torch device (default: the GPU if there is one, else the CPU)")


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, metavar="N", help="number of CPU threads that torch uses")


def add_threads_and_json(parser: argparse.ArgumentParser) -> None:
    add_threads(parser)
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")


def method_and_score(text: str) -> tuple[str, str]:
    method, plus, score = text.partition("+")
    if not plus:
        raise argparse.ArgumentTypeError(f"{text!r} is not METHOD+SCORE, for example snapkv+mix")
    return method, score


def yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def list_of(item: Callable[[str], Any]) -> Callable[[str], list]:
    """The type of a comma-separated list."""

    def parse(text: str) -> list:
        return [item(part.strip()) for part in text.split(",") if part.strip()] or [item(text)]

    parse.__name__ = f"{item.__name__} list"
    return parse


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a non-negative integer")
    return int(text)


def budget(text: str) -> int | float | str:
    if text == AUTO or text.endswith(("B", "%")):
        return text
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of KV entries, for example 128, nor a share, for example 0.1, nor bytes, for example "
            f"64MiB or 10%, nor auto"
        ) from None
