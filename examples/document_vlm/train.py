"""Trains the document model: a reader of cells, and a LoRA that teaches SmolLM2 to look things up on pages.

    pip install -c constraints.txt -e '.[pages]' peft
    python examples/document_vlm/train.py --out mixkv/document/weights

The reader (reading.py) learns to turn a cell into the language model's own embedding of what stands in it, and where; at the
same time, on another core, the language model (answering.py) learns to answer about pages given as such embeddings; then two
processes go on with it, later on pages as the reader sees them. Step counts, seeds and threads are fixed: on one machine and one set of versions the files
come out the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import answering
import reading
import torch
from common import MEETING, TEXT_PART, log

READER_STEPS, TEXT_STEPS, PAGE_STEPS = 4000, 380, 520


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the weights are written")
    parser.add_argument("--stage", choices=["all", "reader", "text", "pages"], default="all")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help="few steps, to see that it runs and comes out the same twice")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.stage == "all":
        every_stage(out, ["--short"] if options.short else [])
        return
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Nothing reads memory before it is written; filling it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    reader_steps, text_steps, page_steps = (6, 4, 8) if options.short else (READER_STEPS, TEXT_STEPS, PAGE_STEPS)
    if options.stage == "reader":
        reading.train(reader_steps, out)
    elif options.stage == "text":
        answering.text(text_steps, out)
    else:
        answering.pages(page_steps, out, options.rank)


def every_stage(out: Path, options: list[str]) -> None:
    started = time.perf_counter()
    again = [sys.executable, __file__, "--out", str(out), *options, "--stage"]
    _together([[*again, stage] for stage in ("reader", "text")])
    (out / MEETING).unlink(missing_ok=True)
    _together([[*again, "pages", "--rank", str(rank)] for rank in range(answering.PROCESSES)])
    for part in (TEXT_PART, MEETING):
        (out / part).unlink(missing_ok=True)
    log("all stages done", started)


def _together(commands: list[list[str]]) -> None:
    processes = [subprocess.Popen(command) for command in commands]
    if any([process.wait() for process in processes]):
        sys.exit("a stage failed: see above")


if __name__ == "__main__":
    main()
