"""``mixkv read``: a document becomes a file with its compressed cache, for ``mixkv ask``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import registry
from .arguments import add_model, add_threads, add_threshold, budget
from .results import check_writable, set_threads


def add_parser(commands) -> None:
    command = commands.add_parser("read", help="a document is read and compressed once, into a file that ask answers from")
    command.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text, PDF (pip install pypdf) or page images")
    command.add_argument("--out", required=True, metavar="FILE", help="where to save the compressed document")
    command.add_argument(
        "--budget",
        type=budget,
        default=0.2,
        metavar="N",
        help="KV entries per KV head (a whole number), or a share of the document in (0, 1], or auto: all whose score exceeds the "
        "threshold (default 0.2)",
    )
    add_threshold(command)
    for name, default, names in (("method", "global", registry.METHODS), ("score", "replay", registry.SCORES)):
        command.add_argument(
            f"--{name}", default=default, metavar="NAME", help=f"any of {', '.join(names)} (default {default})"
        )
    command.add_argument("--no-chat", action="store_true", help="give the document as it is, without the chat template")
    add_model(command, "SmolLM2-135M-Instruct; with page images the small document model around it")
    add_threads(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..evaluation import compare, documents, loading
    from ..read import default_config

    set_threads(options)
    check_writable(options.out, "--out")
    document = documents.Document.of(options.files)
    usual = default_config(images=bool(document.images))
    given = {} if options.threshold is None else {"threshold": options.threshold}
    given |= {"window": usual.window, "refit": usual.refit}
    (config,) = compare.grid([(options.method, options.score)], [options.budget], **given)
    loaded = loading.load(options.model, dtype=options.dtype, device=options.device, vision=bool(document.images))
    kept = documents.keep(loaded, document, config, chat=not options.no_chat)
    kept.save(options.out, options.model)
    numbers = kept.cache.stats()
    print(
        f"{kept.ids.shape[1]:,} tokens read by {loaded.name}: {numbers['bytes'] / 2**20:.1f} MiB kept of "
        f"{numbers['bytes_full'] / 2**20:.1f} ({numbers['ratio']:.1%})\n{options.out}: "
        f"{Path(options.out).stat().st_size / 2**20:.1f} MiB. Try: mixkv ask {options.out} 'a question'"
    )
