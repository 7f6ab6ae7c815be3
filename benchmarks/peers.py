"""mixkv and kvpress on the same prompts: bytes, prefill, decode step and KL at equal KV entries, each relative to its full cache.

    python benchmarks/peers.py [--prompt-tokens 1024,4096] [--rows 128] [--threads N] [--json FILE]

kvpress pins an older transformers: it runs in a virtual environment of its own, which is made on the first run and kept
in mixkv's cache folder. The two processes take turns and only one computes at a time. Ratios are taken to the full cache of
the same process within a turn; their medians are reported. KL is along the full cache's own greedy answer, in nats a token.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mixkv.evaluation import (  # noqa: E402
    InputError,
    loading,
    machine,
    prompts,
    tables,
)

KVPRESS = "kvpress==0.5.5"
FULL = "full"
# With a higher load average before the start, times are not reliable.
QUIET = 0.3


class Worker:
    """One library's process; see `peers_worker.py`."""

    def __init__(self, library: str, python: Path, folder: str, rows: int, window: int, threads: int):
        script = Path(__file__).with_name("peers_worker.py")
        command = [str(python), str(script), library, folder, *map(str, (rows, window, threads))]
        self.library = library
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        made = self._receive()
        self.names, self.versions = made["names"], made["versions"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer, so that only one worker computes at a time."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker for {self.library} ended with code {self.process.wait()}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def environment() -> Path:
    """The Python of an environment with kvpress and this torch version, created if it does not exist."""
    wanted = [KVPRESS, f"torch=={torch.__version__.split('+')[0]}"]
    folder = loading.cache_folder() / "peers"
    python, made = folder / "bin" / "python", folder / "requirements.txt"
    if not made.is_file() or made.read_text().split() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"making an environment with {' and '.join(wanted)} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True, stdout=sys.stderr)
        made.write_text("\n".join(wanted))
    return python


def compare(workers: list[Worker], ids: list[int], repeats: int, steps: int, progress) -> list[dict[str, Any]]:
    """Measures every cache of every worker on one prompt: ``repeats`` (>= 2) rounds of prefills, then ``steps`` rounds of decode steps.

    Returns: a dict each, with library, cache, prompt_tokens; bytes, rows_per_head (attended, on average), layer_rows;
        prefill_seconds, step_seconds (medians); bytes_to_full, prefill_to_full, step_to_full; mean_kl.
    """
    work = repeats * sum(len(worker.names) for worker in workers) + steps
    reads: list[dict[tuple[str, str], dict[str, Any]]] = []
    for turn in range(repeats):
        reads.append({})
        for worker in workers[turn % 2 :] + workers[: turn % 2]:
            for name in worker.names:
                progress(f"{worker.library}: reading {len(ids):,} tokens, {name}", work)
                reads[-1][worker.library, name] = worker.ask(read=name, ids=ids)
        if turn == 0:
            # The answers change the full caches; the next round creates new ones.
            answers = [worker.ask(answer=steps + 1)["tokens"] for worker in workers]
    fed, compared = answers[0], min(len(answers[0]) - 1, steps)
    if any(other != fed for other in answers):
        print("the full caches of the two libraries answer differently; both are fed the first one's answer", file=sys.stderr)
    decodes: list[dict[tuple[str, str], float]] = []
    divergences: dict[tuple[str, str], list[float]] = {key: [] for key in reads[0]}
    for turn in range(steps):
        progress("decoding, turn by turn", work)
        decodes.append({})
        for worker in workers[turn % 2 :] + workers[: turn % 2]:
            outcome = worker.ask(step=fed[turn % len(fed)], first=turn)
            decodes[-1].update({(worker.library, name): seconds for name, seconds in outcome["seconds"].items()})
            if turn < compared:
                for name, value in outcome["kl"].items():
                    divergences[worker.library, name].append(value)
    return [_record(key, len(ids), reads, decodes, divergences[key]) for key in reads[0]]


def _record(key: tuple[str, str], length: int, reads: list, decodes: list, divergences: list[float]) -> dict[str, Any]:
    full, last = (key[0], FULL), reads[-1]
    return {
        "library": key[0],
        "cache": key[1],
        "prompt_tokens": length,
        "bytes": last[key]["bytes"],
        "rows_per_head": last[key]["rows_per_head"],
        "layer_rows": last[key]["layer_rows"],
        "prefill_seconds": median(turn[key]["seconds"] for turn in reads),
        "step_seconds": median(turn[key] for turn in decodes),
        "bytes_to_full": last[key]["bytes"] / last[full]["bytes"],
        "prefill_to_full": median(turn[key]["seconds"] / turn[full]["seconds"] for turn in reads),
        "step_to_full": median(turn[key] / turn[full] for turn in decodes),
        "mean_kl": mean(divergences) if divergences else None,
    }


def show(console: tables.Console, records: list[dict[str, Any]]) -> None:
    """Prints the result of `compare`."""
    table = tables.narrow_table("library", "cache", "rows", "MiB", "bytes", "prefill", "step", "KL")
    for record in records:
        full = record["cache"] == FULL
        table.add_row(
            record["library"],
            record["cache"],
            f"{record['rows_per_head']:,.0f}",
            tables.mebibytes(record["bytes"]),
            tables.times(record["bytes_to_full"], 3),
            f"{record['prefill_seconds']:.2f} s" if full else tables.times(record["prefill_to_full"]),
            f"{1e3 * record['step_seconds']:.1f} ms" if full else tables.times(record["step_to_full"]),
            "" if record["mean_kl"] is None else f"{record['mean_kl']:.3f}",
            style="bold" if full else None,
        )
    console.print(f"\nA prompt of {records[0]['prompt_tokens']:,} tokens")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="ID", help="Hugging Face id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--prompt-tokens", default="1024,4096", metavar="N,N", help="default 1024,4096")
    parser.add_argument("--rows", type=int, default=128, metavar="N", help="rows a KV head on average (default 128)")
    parser.add_argument(
        "--window", type=int, default=32, metavar="N", help="last tokens, whose queries score the others (default 32)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="how often each prompt is read (default 3)")
    parser.add_argument("--steps", type=int, default=48, metavar="N", help="decode steps of each cache (default 48)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="CPU threads of torch")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    given = parser.parse_args()
    lengths = [int(part) for part in given.prompt_tokens.split(",")]
    if given.repeats < 2 or min(lengths) <= 2 * given.rows:
        parser.error(f"--repeats {given.repeats} must be 2 or more, and --prompt-tokens more than twice --rows {given.rows}")
    python, load = environment(), os.getloadavg()[0]
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            loaded = loading.load(given.model, device="cpu")
            transformers.utils.logging.disable_progress_bar()
            loaded.model.save_pretrained(folder)
            ids = prompts.filler(loaded.tokenizer, max(lengths))[0].tolist()
            name = loaded.name
            del loaded
            for library, own in (("mixkv", Path(sys.executable)), ("kvpress", python)):
                workers.append(Worker(library, own, folder, given.rows, given.window, given.threads))
            with tables.progress_bar() as progress:
                found = [compare(workers, ids[:length], given.repeats, given.steps, progress) for length in lengths]
        finally:
            for worker in workers:
                worker.close()
    console = tables.Console()
    versions = {worker.library: worker.versions for worker in workers}
    console.print(f"{name}, cpu, {given.threads} threads; {versions}", style="dim")
    for records in found:
        show(console, records)
    if load > QUIET:
        console.print(f"The load average was {load:.2f} before the start: times are not to be trusted", style="yellow")
    if given.json:
        described = {**machine.describe(torch.device("cpu")), "threads": given.threads, "load_average_before": load}
        report = {
            "machine": described,
            "versions": versions,
            "settings": {**vars(given), "model": name},
            "runs": sum(found, []),
        }
        Path(given.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"benchmarks/peers.py: error: {error}")
