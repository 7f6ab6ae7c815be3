"""The diffs of docs/extending.md apply to the code, and what they add works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
DIFFS = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)

# Runs with the diffs applied: what each of them adds.
CHECK = """
import torch
from support import zoo

import mixkv
from mixkv.document import page, render
from mixkv.ops import dispatch
from mixkv.ops.arguments import RaggedBuffers

query, key, value = (torch.randn(shape) for shape in ((2, 4, 6, 16), (2, 2, 40, 16), (2, 2, 40, 16)))
selection = mixkv.select(query, key, value, mixkv.MixKVConfig(method="entropy", score="recent", budget=14, window=6))
assert selection.lengths.sum(dim=1).tolist() == [28, 28]

position = torch.arange(30, dtype=torch.int32) % 11
starts, lengths = torch.tensor([0, 10], dtype=torch.int32), torch.tensor([7, 12], dtype=torch.int32)
buffers = RaggedBuffers(torch.zeros(30, 16), torch.zeros(30, 16), position, starts, lengths)
expected = [int((position[first : first + length] < 5).sum()) for first, length in ((0, 7), (10, 12))]
assert dispatch.count_before("torch", buffers, 5).tolist() == expected

model, prompts = zoo.build("granite"), zoo.inputs("granite", 48)
cache = mixkv.MixKVCache(model, budget=20, window=8, rows="half")
model.generate(**prompts, cache=cache, max_new_tokens=5)
assert cache.layers[0].rows.resident.key.dtype == torch.bfloat16
assert cache.stats()["lengths"][0].sum() < 2 * 48

for layout in range(4):
    document = page.make("ticket", layout, layout=layout)
    assert len(document.facts) == 4
    render.draw(document.pages[0], "ticket")
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    if shutil.which("git") is None:
        pytest.skip("git is not installed, which applies the diffs")
    folder = tmp_path_factory.mktemp("repository")
    for part in ("mixkv", "csrc", "tests/support"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("weights", "__pycache__", "_native"))
    return folder


def git_apply(folder, diff):
    # Outside any repository: `git apply` leaves out paths that a repository around the folder does not know.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "--verbose", "-"]
    return subprocess.run(command, input=diff, text=True, cwd=folder, env=environment, capture_output=True)


def test_diffs_apply_and_what_they_add_works(copy):
    for diff in DIFFS:
        done = git_apply(copy, diff)
        assert done.returncode == 0, f"{done.stderr}\n{diff}"
    paths = {path for diff in DIFFS for path in re.findall(r"^\+\+\+ b/(.*)$", diff, re.M)}
    assert all((copy / path).is_file() for path in paths)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "tests")]), "MIXKV_BACKEND": "torch"}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=copy, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_every_section_that_promises_a_diff_has_one():
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    without = [section.splitlines()[0] for section in sections if "```diff" not in section]
    assert without == ["Other things"]
