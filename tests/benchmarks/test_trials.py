"""benchmarks/trials.py: what its tables say is what the samples say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, COMMITTED = ROOT / "benchmarks" / "trials.py", ROOT / "benchmarks" / "results" / "trials.jsonl"


def printed(file: Path) -> str:
    return subprocess.run([sys.executable, SCRIPT, file], capture_output=True, text=True, check=True).stdout


def test_changes_and_their_geometric_mean(tmp_path):
    lines = [
        {"trial": "T", "model": "M", "task": task, "seed": seed, "kl": {"one": {"64": 2.0}, "other": {"64": 2.0 * factor}}}
        for task, factor in (("a", 0.5), ("b", 0.125))
        for seed in (0, 2)
    ]
    file = tmp_path / "trials.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    told = printed(file)
    assert "T: M, budget 64, 2 samples a task" in told and "| one: KL | | 2.0000 | 2.0000 |" in told
    assert "| other | **-75% [-75%, -75%]** | **-50% [-50%, -50%]** | **-88% [-88%, -88%]** |" in told


def test_committed_samples_are_what_the_document_shows():
    if not COMMITTED.is_file():
        pytest.skip("the results are not part of an installed package")
    told = re.findall(r"^\|.*\|$", printed(COMMITTED), re.MULTILINE)
    shown = (ROOT / "research" / "trials.md").read_text(encoding="utf-8").splitlines()
    assert told and set(told) <= set(shown)
