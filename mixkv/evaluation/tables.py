"""Results for people: rich tables, and a progress bar. Nothing here measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from .measure import Progress


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error, gone when its block ends."""
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading the model", total=None)
        begun = 0

        def progress(what: str, total: int) -> None:
            nonlocal begun
            bar.update(task, description=what, total=total, completed=begun)
            begun += 1

        yield progress


def comparison(console: Console, records: list[dict[str, Any]]) -> None:
    """Prints what `compare.run` returns: the numbers, then the answers."""
    numbers = Table(title=f"Prompt of {records[0]['prompt_tokens']:,} tokens", title_justify="left")
    for name in ("method", "score"):
        numbers.add_column(name)
    for name in ("budget", "rows a head", "held", "bytes", "prefill", "step", "same tokens", "mean KL"):
        numbers.add_column(name, justify="right")
    answers = Table(title="Answers", title_justify="left", show_lines=True)
    answers.add_column("cache", no_wrap=True)
    answers.add_column("answer")
    for record in records:
        full = record["budget"] is None
        numbers.add_row(
            "full cache" if full else record["method"],
            record["score"] or "",
            "" if full else str(record["budget"]),
            f"{record['rows_per_head']:,.0f}",
            mebibytes(record["bytes"]),
            times(record["bytes_ratio"]),
            f"{record['prefill_seconds']:.2f} s" if full else times(record["prefill_ratio"]),
            f"{1e3 * record['step_seconds']:.1f} ms" if full else times(record["step_ratio"]),
            f"{record['equal_tokens']}/{record['reference_tokens']}",
            "" if record["mean_kl"] is None else f"{record['mean_kl']:.3f}",
            style="bold" if full else None,
        )
        name = "full cache" if full else f"{record['method']} {record['score']} {record['budget']}"
        answers.add_row(name, record["answer"])
    console.print(numbers)
    console.print(
        "Ratios are to the full cache, in the same turn. same tokens: how many first tokens of the greedy answer are the full "
        "cache's. mean KL: nats a token, over the full cache's answer. One text is an illustration, not an evaluation.",
        style="dim",
    )
    console.print(answers)


def benchmark(console: Console, records: list[dict[str, Any]]) -> None:
    """Prints what `bench.run` returns."""
    table = Table(title="Time and memory", title_justify="left")
    table.add_column("cache")
    for name in ("prompt", "held", "prefill", "first token", "step", "bytes", "prefill", "step", "step/floor", "step/shortest"):
        table.add_column(name, justify="right")
    length = None
    for record in records:
        if record["prompt_tokens"] != length:
            table.add_section()
            length = record["prompt_tokens"]
        table.add_row(
            record["method"],
            f"{length:,}",
            mebibytes(record["bytes"]),
            f"{record['prefill_seconds']:.3f} s",
            f"{record['first_token_seconds']:.3f} s",
            f"{1e3 * record['step_seconds']:.1f} ms",
            *(
                times(record[name])
                for name in ("bytes_to_full", "prefill_to_full", "step_to_full", "step_to_floor", "step_to_shortest")
            ),
        )
    console.print(table)
    peaks = {
        f"{record['method']} {record['prompt_tokens']}": record["peak_bytes"] for record in records if record["peak_bytes"]
    }
    if peaks:
        console.print("Peak memory while reading: " + ", ".join(f"{name}: {mebibytes(peak)}" for name, peak in peaks.items()))


def targets(console: Console, found: list[dict[str, Any]]) -> None:
    """Prints what `bench.targets` returns."""
    table = Table(title="Targets", title_justify="left")
    for name in ("what", "method"):
        table.add_column(name)
    for name in ("prompt", "measured", "at most"):
        table.add_column(name, justify="right")
    table.add_column("")
    for target in found:
        met = "[green]met[/green]" if target["met"] else "[red]missed[/red]"
        numbers = (f"{target['prompt_tokens']:,}", f"{target['value']:.3f}", f"{target['limit']:.3f}")
        table.add_row(target["what"].replace("_", " "), target["method"], *numbers, met)
    console.print(table)


def appends(console: Console, records: list[dict[str, Any]]) -> None:
    """Prints what `bench.append_times` returns."""
    table = Table(title="Appending one row to every head of one layer", title_justify="left")
    for name in ("rows held a head", "in place (median)", "growth spread over all (mean)"):
        table.add_column(name, justify="right")
    for record in records:
        seconds = (record["in_place_seconds"], record["growing_seconds"])
        table.add_row(f"{record['rows_per_head']:,}", *(f"{1e6 * value:.1f} us" for value in seconds))
    console.print(table)


def mebibytes(count: int) -> str:
    """As in ``12.3 MiB``."""
    return f"{count / 2**20:.1f} MiB"


def times(ratio: float | None) -> str:
    """As in ``0.071x``; nothing for None."""
    return "" if ratio is None else f"{ratio:.3f}x"
