"""The notebook runs from top to bottom and shows what it promises."""

import os
from pathlib import Path

import pytest
from support.language_model import require_smollm2

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

TESTS = Path(__file__).parents[1]
TOUR = TESTS.parent / "examples" / "tour.ipynb"

# Stands in for SmolLM2: a tiny random model, one token a character.
TINY = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import tokenizers, transformers
from support import zoo
model = zoo.build("llama")
letters = {{chr(32 + index): index + zoo.TEXT.start for index in range(95)}} | {{"\\n": 100}}
inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token=" "))
inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\\s\\S]"), "isolated")
inner.decoder = tokenizers.decoders.Fuse()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
tokenizer.chat_template = "{{% for turn in messages %}}{{{{ turn['content'] }}}}|{{% endfor %}}"
"""


@pytest.fixture(scope="module")
def tour():
    return nbformat.read(TOUR, as_version=4)


def test_it_is_kept_without_outputs(tour):
    nbformat.validate(tour)
    for cell in tour.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None), cell.id


@pytest.mark.parametrize(
    "with_smollm2",
    [True, False],
    ids=["smollm2", "tiny"],
)
def test_it_runs(tour, tmp_path, monkeypatch, with_smollm2):
    if with_smollm2:
        require_smollm2()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]))
    run = nbformat.from_dict(tour)
    cells = {cell.id: cell for cell in run.cells}
    if not with_smollm2:
        cells["model"].source = TINY
        cells["document"].source = cells["document"].source.replace("LENGTH = 1200", "LENGTH = 900")
    nbclient.NotebookClient(run, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "<svg" in shown(cells["cache"], "text/html")
    for name in ("heat-maps", "kept", "kept-one", "compare"):
        assert shown(cells[name], "image/png"), name
    assert "the same answer: True" in printed(cells["refused"]) and "refused: " in printed(cells["refused"])
    assert all(name in printed(cells["register"]) for name in ("without-large-keys: KL", "mix-output: KL"))
    assert not list(tmp_path.iterdir()), "it leaves no files where it runs"
    if with_smollm2:
        assert "honey" in printed(cells["patch"])


def shown(cell, kind):
    return "".join(output.data.get(kind, "") for output in cell.outputs if "data" in output)


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
