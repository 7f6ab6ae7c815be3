"""Every Python block of README.md and docs/ runs, and every mixkv command there has options that exist.

The blocks of a page run one after the other in one namespace, in a folder with ``report.txt`` and ``page.png``. A block that cannot run
here has ``<!-- not run: REASON -->`` on the line above it, with a reason of `REASONS`.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from support import zoo, zoo_processors

import mixkv
from mixkv import registry
from mixkv.cli.parser import make_parser
from mixkv.evaluation import prompts, smollm2

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REASONS = {"needs an NVIDIA GPU", "needs several processes", "needs lm_eval", "needs a notebook"}
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^>]*) -->\n)?(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)
LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
VISION_MODEL = "Qwen/Qwen2-VL-2B-Instruct"


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """The page's blocks in a language: reason for not running, or None; first line; text."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["language"] == language:
            first = text.count("\n", 0, found.start("text")) + 1
            lines = [line.removeprefix(found["indent"]) for line in found["text"].splitlines()]
            yield found["reason"], first, "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def language_model(needs_smollm2):
    return smollm2.load()


@pytest.fixture
def local_models(request, monkeypatch):
    """What the documentation loads from the hub: SmolLM2 as it can be had here, and a tiny model of the family for Qwen2-VL."""

    page = request.node.callspec.params["page"].read_text(encoding="utf-8")
    pair = request.getfixturevalue("language_model") if LANGUAGE_MODEL in page else None

    def load(kind):
        def from_pretrained(hub_id, **_):
            if hub_id == VISION_MODEL:
                build = {"model": zoo.build, "tokenizer": zoo_processors.build}[kind]
                return build("qwen2_vl")
            assert hub_id == LANGUAGE_MODEL, f"{hub_id} is none of the models that the documentation uses"
            return pair[0 if kind == "model" else 1]

        return from_pretrained

    for automatic, kind in (
        ("AutoModelForCausalLM", "model"),
        ("AutoTokenizer", "tokenizer"),
        ("AutoModelForImageTextToText", "model"),
        ("AutoProcessor", "tokenizer"),
    ):
        monkeypatch.setattr(getattr(transformers, automatic), "from_pretrained", load(kind))


@pytest.fixture
def folder_with_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("report.txt").write_text(prompts.demo().text[:1500], encoding="utf-8")
    zoo_processors.picture(64, 96).save("page.png")
    monkeypatch.setenv("MPLBACKEND", "Agg")


@pytest.fixture
def nothing_stays():
    """Undoes what blocks register and patch."""
    methods, scores = dict(registry.METHODS), dict(registry.SCORES)
    namespace = {"__name__": "__main__"}
    yield namespace
    for entries, before in ((registry.METHODS, methods), (registry.SCORES, scores)):
        entries.clear()
        entries.update(before)
    for value in namespace.values():
        if isinstance(value, transformers.PreTrainedModel):
            mixkv.unpatch(value)


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=name)
def test_python_blocks_run(page, local_models, folder_with_inputs, nothing_stays):
    torch.manual_seed(0)
    for reason, first, text in blocks(page, "python"):
        if reason is None:
            # Line numbers of errors are those of the page.
            exec(compile("\n" * (first - 1) + text, str(page), "exec"), nothing_stays)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_are_left_out_for_known_reasons(page):
    reasons = {reason for language in ("python", "bash") for reason, *_ in blocks(page, language) if reason is not None}
    assert reasons <= REASONS


def commands():
    for page in PAGES:
        for _, first, text in blocks(page, "bash"):
            for line in text.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|", re.sub(r"(^|\s)#.*", "", line)):
                    words = shlex.split(part)
                    if words:
                        yield pytest.param(words, id=f"{name(page)}:{first} {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", commands())
def test_commands_exist(words):
    """Options of ``mixkv`` commands are accepted, and scripts that are run exist."""
    while words and "=" in words[0]:
        words = words[1:]
    words = words[2:] if words[:2] == ["python", "-m"] else words
    if words[0] == "mixkv":
        make_parser().parse_args(words[1:])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "pip":
        extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
        for extra in re.findall(r"(?:mixkv|\.)\[([\w,]+)\]", " ".join(words)):
            assert all(re.search(rf"^{part} = \[", extras, re.M) for part in extra.split(","))
    else:
        assert words[0] in ("pytest", "mkdocs", "mixkv.harness", "lmms-eval", "torchrun", "accelerate")
