"""Two processes of ``accelerate launch`` on a CPU, which meet through gloo."""

import os
import re
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import os, sys
from mixkv import cli
from mixkv.evaluation import spread

added, add = [], spread.Book.add
spread.Book.add = lambda book, record: (added.append(record), add(book, record))
{before}
code = cli.main(sys.argv[1:])
print("process", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "finished", len(added))
sys.exit(code)
"""


def run_two(folder, arguments, before="") -> tuple[str, dict[int, int]]:
    """`mixkv` with ``arguments`` in two processes, after the statements ``before``: stdout, and by rank the samples finished."""
    script = folder / "two.py"
    script.write_text(_SCRIPT.format(before=before))
    # On a machine without a GPU accelerate starts several processes of its own by this option only.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(script)]
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [*launch, *arguments],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, {int(rank): int(count) for rank, count in re.findall(r"process (\d) of 2 finished (\d+)", done.stdout)}
