"""``mixkv demo``: a comparison on a text, or on a page, that mixkv contains."""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product

from .. import registry
from .arguments import add_threads_and_json
from .compare import encode_text, print_comparison


def add_parser(commands) -> None:
    command = commands.add_parser(
        "demo", help="a long text and a question: the full cache and compressed ones compared, on SmolLM2"
    )
    command.add_argument(
        "--all", action="store_true", help="every method and score, with budgets 64, 128 and 256 (about 15 minutes)"
    )
    add_threads_and_json(command)
    command.add_argument("--vision", action="store_true", help="a page and a question about it, on the small document model")
    command.add_argument(
        "--picture",
        default="mixkv-demo.png",
        metavar="FILE",
        help="with --vision: where to draw the page and the patches that are kept (default mixkv-demo.png)",
    )
    command.set_defaults(run=run, model=None, dtype="auto", device=None, no_chat=False, repeats=2, max_new_tokens=48)


_NEXT = """
Try next:
  mixkv read --model YOUR_MODEL FILE --out doc.mixkv    reads and compresses a document once
  mixkv ask doc.mixkv "..."                             answers from it, as often as you like
  mixkv compare --model YOUR_MODEL --prompt-file FILE --question "..."    the same on your own model and text
  mixkv demo --vision    a page as an image, and what is kept of it (pip install 'mixkv[pages]')
  mixkv.patch(model)     in Python: from there on generate() keeps a compressed cache"""


def run(options: argparse.Namespace) -> None:
    from ..evaluation import compare, packages, prompts

    packages.require(*packages.PACKAGES, "rich")
    if options.vision:
        _run_vision(options)
        return
    if options.all:
        for method in registry.METHODS.values():
            if method.needs_profile:
                print(
                    f"{method.name} is left out because it needs a head profile of the model. With one, run: "
                    f"mixkv compare --method {method.name} --profile FILE"
                )
        methods = [method.name for method in registry.METHODS.values() if not method.needs_profile]
        configs = compare.grid(list(product(methods, registry.SCORES)), [64, 128, 256])
    else:
        kinds = [("snapkv", "attn"), ("adakv", "mix"), ("adakv", "mix-output"), ("global", "mix-output")]
        configs = [config for kind in kinds for config in compare.grid([kind], [64, 128])]
    loaded, _ = print_comparison(options, partial(encode_text, options, prompts.demo()), configs)
    print_questions(loaded)
    print(_NEXT)


def print_questions(loaded) -> None:
    """A text that is read and compressed once, and five questions about it."""
    from ..config import MixKVConfig
    from ..evaluation import documents, measure, prompts, tables
    from ..read import default_config

    later, budget = prompts.demo_later(), 0.2
    columns = {
        "full cache": None,
        f"global mix-output {budget}": MixKVConfig(budget=budget),
        f"mixkv.read {budget}": default_config().replace(budget=budget),
    }
    document, answers, sizes = documents.Document(later.text), [], []
    with tables.progress_bar() as progress:
        for name, config in columns.items():
            progress(f"five questions: {name}", len(columns))
            kept = documents.keep(loaded, document, config, chat=False, progress=False)
            sizes.append(measure.held(kept.cache).bytes)
            answers.append([kept.ask(question, max_new_tokens=8) for question, _ in later.questions])
    tables.questions(tables.Console(), later.questions, list(columns), sizes, answers)


def _run_vision(options: argparse.Namespace) -> None:
    from ..evaluation import charts, compare, packages, pages

    packages.require(*packages.PAGES, remedy=packages.INSTALL_PAGES)
    charts.check(options.picture, "--picture")
    kinds = [("snapkv", "attn"), ("snapkv", "mix"), ("global", "mix-output")]
    configs = [config for kind in kinds for config in compare.grid([kind], [48, 96])]
    drawn = [config for config in configs if config.budget == 48]
    loaded, reading = print_comparison(options, pages.demo, configs, vision=True)
    charts.patches(loaded.model, reading, drawn, options.picture)
    print(f"The patches that each cache keeps, faded where fewer KV heads keep them: {options.picture}")
