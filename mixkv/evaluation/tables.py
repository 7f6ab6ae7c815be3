"""Results as tables in the terminal, progress while they are made, and what machine they come from."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console()


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on the terminal; yields ``report(what, done, total)``."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def comparison(records: list[dict[str, Any]]) -> None:
    """The table of `compare.run`, and the answers."""
    table = Table(title="against the full cache, same run")
    for name in ("cache", "rows/head", "held", "share", "prefill", "step", "same tokens", "KL"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    length = len(records[0]["tokens"])
    for record in records:
        table.add_row(
            record["name"],
            f"{record['rows']:.0f}",
            size(record["bytes"]),
            f"{record['bytes_ratio']:.1%}",
            f"{record['prefill_s']:.2f} s" if record["name"] == "full" else f"x {record['prefill_ratio']:.2f}",
            f"{record['step_s'] * 1e3:.1f} ms" if record["name"] == "full" else f"x {record['step_ratio']:.2f}",
            f"{record['same_tokens']}/{length}",
            "-" if record["kl"] is None else f"{record['kl']:.3f}",
        )
    console.print(table)
    for record in records:
        console.print(f"[bold]{record['name']:>22}[/bold]  {record['answer']}", highlight=False)


def benchmark(records: list[dict[str, Any]], append: dict, targets: list[tuple[str, float, float]]) -> None:
    """The tables of `bench.run`."""
    table = Table(title="prefill, bytes and decode step; ratios from one run")
    columns = ("prompt", "cache", "prefill", "to full", "held", "to full", "step", "to full", "to floor", "to shortest")
    for name in columns:
        table.add_column(name, justify="left" if name == "cache" else "right")
    for record in records:
        table.add_row(
            str(record["length"]),
            record["name"],
            f"{record['prefill_s']:.2f} s",
            f"{record['prefill_ratio']:.3f}",
            size(record["bytes"]),
            f"{record['bytes_ratio']:.4f}",
            f"{record['step_s'] * 1e3:.1f} ms",
            f"{record['step_to_full']:.3f}",
            f"{record['step_to_floor']:.3f}",
            f"{record['step_to_shortest']:.3f}",
        )
    console.print(table)
    for rows, cost in append.items():
        console.print(
            f"append with {rows} rows a head stored: {cost['in_place_us']:.1f} us in place, {cost['growth_us']:.1f} us of growth per append"
        )
    for what, measured, most in targets:
        mark = "[green]met[/green]" if measured <= most else "[red]missed[/red]"
        console.print(f"{mark} {what}: {measured:.4f}, at most {most:.4f}", highlight=False)


def size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def machine() -> dict[str, Any]:
    """Where results come from."""
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
