"""Results as rich tables, and a progress bar."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from .measure import Progress

# The format before the total is known.
_STARTING = "{desc} [{elapsed}]"


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error if that is a terminal, removed at the end; one line per process."""
    place = int(os.environ.get("LOCAL_RANK", 0))
    with tqdm(desc="loading the model", leave=False, disable=None, position=place, bar_format=_STARTING) as bar:

        def progress(what: str, total: int) -> None:
            if bar.total is None:
                bar.bar_format = None
                bar.reset(total)
            else:
                bar.update()
            bar.set_description(what)

        yield progress


def comparison(console: Console, records: list[dict[str, Any]]) -> None:
    """Prints the records of `compare.run`: the numbers, then the answers."""
    numbers = narrow_table("cache", "rows", "MiB", "bytes", "prefill", "step", "same", "KL")
    answers = narrow_table("cache")
    answers.add_column("answer")
    for record in records:
        full = record["budget"] is None
        name = "full cache" if full else f"{record['method']} {record['score']} {record['budget']}"
        numbers.add_row(
            name,
            f"{record['rows_per_head']:,.0f}",
            mebibytes(record["bytes"]),
            times(record["bytes_ratio"]),
            f"{record['prefill_seconds']:.2f} s" if full else times(record["prefill_ratio"]),
            f"{1e3 * record['step_seconds']:.1f} ms" if full else times(record["step_ratio"]),
            f"{record['equal_tokens']}/{record['reference_tokens']}",
            "" if record["mean_kl"] is None else f"{record['mean_kl']:.3f}",
            style="bold" if full else None,
        )
        answers.add_row(name, Text(record["answer"]))
    console.print(f"\nA prompt of {records[0]['prompt_tokens']:,} tokens")
    console.print(numbers)
    console.print(
        "rows: KV entries per KV head and layer. x: ratio to the full cache, in the same round. same: leading tokens of the greedy "
        "answer that equal the full cache's. KL: divergence from its distributions along its answer, in nats per token. One text "
        "illustrates; it does not evaluate.",
        style="dim",
    )
    console.print(answers)


def evaluation(console: Console, rows: list[dict[str, Any]], reference: tuple[str, str]) -> None:
    """Prints the rows of `paired.summary`, a table per task, length and budget."""
    for task, tokens, budget in dict.fromkeys((row["task"], row["tokens"], row["budget"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["tokens"], row["budget"]) == (task, tokens, budget)]
        console.print(
            f"\n{task}{f', {tokens:,} tokens' if tokens else ''}, budget {budget}, {mine[0]['samples']} samples", style="bold"
        )
        table = narrow_table("cache", "KL", "change", "interval", "top-1", "kept")
        for row in mine:
            change = row["kl_change"]
            table.add_row(
                f"{row['method']} {row['score']}{row['form']}",
                f"{row['kl']:.3f}",
                "" if change is None else f"{change:+.0%}",
                "" if change is None else f"{row['kl_low']:+.0%} .. {row['kl_high']:+.0%}",
                f"{row['top1']:.0%}",
                "" if row["kept"] is None else f"{row['kept']}/{row['answered']}",
                style="bold" if (row["method"], row["score"]) == reference else None,
            )
        console.print(table)
    console.print(
        f"KL: mean divergence from the full cache's distributions, in nats per token. change: of KL relative to {' '.join(reference)}, "
        f"with a 95 % interval (paired bootstrap over samples). top-1: tokens whose most likely token is the full cache's. kept: "
        f"correct answers of the full cache that stay correct; for the document model, exactly correct answers of the cache, and "
        f"of the full cache.",
        style="dim",
    )


def benchmark(console: Console, records: list[dict[str, Any]]) -> None:
    """Prints the records of `bench.run`, by batch size and prompt: the measurements, then the ratios."""
    for batch, length in dict.fromkeys((record["batch"], record["prompt_tokens"]) for record in records):
        size = f"batch size {batch}, " if batch > 1 else ""
        console.print(f"\n{size}{length:,} tokens", style="bold")
        _prompt(console, [record for record in records if (record["batch"], record["prompt_tokens"]) == (batch, length)])
    console.print(
        "rows: KV entries per KV head and layer right after the prompt; MiB: size then; peak: MiB during the prefill. prefill, "
        "first (until the first token), step (decode): medians. compress: the part of the prefill that compression takes. x: "
        "ratio to the full cache of the same prompt; x rest: to the same prefill without compression; x floor, x short: to the "
        "floor and to the shortest prompt. Ratios are medians over rounds.",
        style="dim",
    )


def _prompt(console: Console, records: list[dict[str, Any]]) -> None:
    measured = narrow_table("cache", "rows", "MiB", "peak", "prefill\ns", "compress\nms", "first\ns", "step\nms")
    columns = {
        "bytes\nx": "bytes_to_full",
        "peak\nx": "peak_to_full",
        "prefill\nx": "prefill_to_full",
        "prefill\nx rest": "prefill_to_rest",
        "step\nx": "step_to_full",
        "step\nx floor": "step_to_floor",
        "step\nx short": "step_to_shortest",
    }
    ratios = narrow_table("cache", *columns)
    for record in records:
        measured.add_row(
            record["method"],
            f"{record['rows_per_head']:,.0f}",
            mebibytes(record["bytes"]),
            "" if record["peak_bytes"] is None else mebibytes(record["peak_bytes"]),
            f"{record['prefill_seconds']:.3f}",
            f"{1e3 * record['compress_seconds']:.0f}",
            f"{record['first_token_seconds']:.3f}",
            f"{1e3 * record['step_seconds']:.1f}",
        )
        found = (record[name] for name in columns.values())
        ratios.add_row(record["method"], *("" if ratio is None else f"{ratio:.3f}" for ratio in found))
    console.print(measured)
    if any(record["prefill_to_full"] is not None for record in records):
        console.print(ratios)


def targets(console: Console, found: list[dict[str, Any]]) -> None:
    """Prints the result of `bench.targets`."""
    table = narrow_table("target", "prompt", "method", "measured", "at most", "")
    for target in found:
        table.add_row(
            target["what"].replace("_", " "),
            f"{target['batch']} x {target['prompt_tokens']:,}",
            target["method"],
            f"{target['value']:.3f}",
            f"{target['limit']:.3f}",
            "[green]met[/green]" if target["met"] else "[red]missed[/red]",
        )
    console.print(table)


def appends(console: Console, records: list[dict[str, Any]]) -> None:
    """Prints the result of `bench.append_times`."""
    table = narrow_table("entries per head", "in place (median)", "with growth (mean)")
    for record in records:
        seconds = (record["in_place_seconds"], record["growing_seconds"])
        table.add_row(f"{record['rows_per_head']:,}", *(f"{1e6 * value:.1f} us" for value in seconds))
    console.print("Appending one KV entry to every head of one layer")
    console.print(table)


def heads(console: Console, profile: Sequence[Sequence[float]], counts: dict[str, int], shown: int = 10) -> None:
    """Prints the heads with the highest scores, and the number of pages, ``boxed`` tokens and ``right`` tokens."""
    ranked = sorted(
        ((score, layer, head) for layer, row in enumerate(profile) for head, score in enumerate(row)),
        key=lambda one: (-one[0], *one[1:]),
    )
    total, scored = sum(score for score, _, _ in ranked), sum(score > 0 for score, _, _ in ranked)
    console.print(
        f"\n{counts['pages']} pages: {counts['right']:,} of {counts['boxed']:,} answer tokens correct; {scored} of {len(ranked)} heads "
        f"have a score"
    )
    table = narrow_table("layer-head", "score", "share", "cumulative")
    so_far = 0.0
    for score, layer, head in ranked[: min(shown, scored)]:
        so_far += score
        table.add_row(f"{layer}-{head}", f"{score:.3f}", f"{score / total:.1%}", f"{so_far / total:.1%}")
    console.print(table)


def warning(console: Console, text: str | None) -> None:
    """Prints a warning, unless it is None."""
    if text is not None:
        console.print(text, style="yellow")


def mebibytes(count: int) -> str:
    """A number of bytes in MiB, without the unit."""
    return f"{count / 2**20:.1f}"


def times(ratio: float, digits: int = 2) -> str:
    """A ratio as text, for example ``0.07x``."""
    return f"{ratio:.{digits}f}x"


def questions(
    console: Console, asked: list[tuple[str, str]], names: list[str], sizes: list[int], answers: list[list[str]]
) -> None:
    """Prints what several caches of one text answer.

    Args:
        asked: questions, and a word of each answer.
        names, sizes: of the caches; bytes.
        answers: by cache, then by question.
    """
    table = narrow_table("question, asked after the text was read")
    for name in names:
        table.add_column(name)
    for number, (question, word) in enumerate(asked):
        lines = (given[number].splitlines() or [""] for given in answers)
        cells = [Text(line[0], style="bold" if word in line[0] else "dim") for line in lines]
        table.add_row(Text(question.partition("?")[0] + "?"), *cells)
    right = [sum(word in answer for answer, (_, word) in zip(given, asked)) for given in answers]
    table.add_row("right answers", *(f"{count} of {len(asked)}" for count in right))
    table.add_row("memory", *(f"{mebibytes(size)} MiB" for size in sizes))
    console.print("\nOne text, read and compressed once, and then five questions")
    console.print(table)


def narrow_table(first: str, *others: str) -> Table:
    """A table for terminals of 80 characters, its first column aligned left and the others right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
