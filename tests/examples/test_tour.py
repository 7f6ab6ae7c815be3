"""The notebook runs from top to bottom, and its stored outputs are those of such a run."""

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


# Stands in for the document model: a tiny LLaVA and an image of 9 patches amid text.
TINY_PAGE = """
from types import SimpleNamespace
from support import zoo_processors
processor, image = zoo_processors.build("llava"), zoo_processors.picture(24, 24)
inputs_of_page = dict(zoo_processors.encode(processor, [[image]], lengths=[80]))
vision = SimpleNamespace(model=zoo.build("llava"), tokenizer=processor.tokenizer)
page = SimpleNamespace(input_ids=inputs_of_page.pop("input_ids"), inputs=inputs_of_page, images=[image])
"""


@pytest.fixture(scope="module")
def tour():
    return nbformat.read(TOUR, as_version=4)


def test_it_has_its_outputs(tour):
    """To store them anew: ``jupyter execute --inplace --NotebookClient.record_timing=False examples/tour.ipynb``."""
    nbformat.validate(tour)
    assert [cell.execution_count for cell in tour.cells if cell.cell_type == "code"] == list(
        range(1, 1 + sum(cell.cell_type == "code" for cell in tour.cells))
    )
    assert not [cell.id for cell in tour.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    assert TOUR.stat().st_size < 1.5 * 2**20
    shows_what_it_promises({cell.id: cell for cell in tour.cells}, tour.metadata.widgets)
    assert "honey" in printed({cell.id: cell for cell in tour.cells}["patch"])


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
    for name in ("slider", "page-slider"):  # fewer budgets than are stored: each is a prompt to read and an answer
        assert "budgets=(40, 48, 64, 96, 128)" in cells[name].source
        cells[name].source = cells[name].source.replace("(40, 48, 64, 96, 128)", "(40,)")
    if not with_smollm2:
        cells["model"].source = TINY
        cells["page-model"].source = TINY_PAGE
        cells["document"].source = cells["document"].source.replace("LENGTH = 1200", "LENGTH = 900")
    nbclient.NotebookClient(run, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shows_what_it_promises(cells, run.metadata.widgets)
    assert not list(tmp_path.iterdir()), "it leaves no files where it runs"
    if with_smollm2:
        assert "honey" in printed(cells["patch"])


def shows_what_it_promises(cells, widgets):
    assert "<svg" in shown(cells["cache"], "text/html")
    for name in ("kept", "page", "heat-maps", "kept-one", "compare"):
        assert shown(cells[name], "image/png"), name
    states = widgets["application/vnd.jupyter.widget-state+json"]["state"]
    for name in ("slider", "page-slider"):
        view = next(output.data["application/vnd.jupyter.widget-view+json"] for output in cells[name].outputs)
        children = states[view["model_id"]]["state"]["children"]
        slider, stack = (states[child.removeprefix("IPY_MODEL_")] for child in children)
        assert (slider["model_name"], stack["model_name"]) == ("SelectionSliderModel", "StackModel")
        assert len(slider["state"]["_options_labels"]) == len(stack["state"]["children"]) > 1
    assert "the same answer: True" in printed(cells["refused"]) and "refused: " in printed(cells["refused"])
    assert all(name in printed(cells["register"]) for name in ("without-large-keys: KL", "mix-output: KL"))


def shown(cell, kind):
    return "".join(output.data.get(kind, "") for output in cell.outputs if "data" in output)


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
