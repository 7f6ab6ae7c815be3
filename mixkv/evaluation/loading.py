"""Loading models: SmolLM2, the document model, or any model of transformers by its id or folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from ..ops.build import cache_folder
from . import InputError, document_model, smollm2
from .loaded import Loaded
from .packages import INSTALL_PAGES, PACKAGES, PAGES, require
from .smollm2 import first_line

__all__ = ["INSTALL_PAGES", "PACKAGES", "PAGES", "Loaded", "cache_folder", "load", "require"]


def load(name: str | None = None, *, dtype: str = "auto", device: str | None = None, vision: bool = False) -> Loaded:
    """Loads a causal language model, or (``vision``) a vision-language model with its processor.

    Args:
        name: a Hugging Face id or a folder. None: SmolLM2-135M-Instruct, or with ``vision`` the document model around it; see
            `mixkv.evaluation.smollm2.load`.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: as the model was saved.
        device: a torch device. None: the GPU if there is one, else the CPU.

    Raises:
        InputError: the model cannot be found or loaded, or the device does not exist.
    """
    where = _device(device)
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    with _quiet():
        if vision and name is None:
            return document_model.load(dtype=torch.float32 if dtype == "auto" else kind, device=where)
        if name is None:
            model, tokenizer = smollm2.load(kind)
            return Loaded(model.to(where).eval(), tokenizer, smollm2.NAME)
        automatic, reader = (AutoModelForImageTextToText, AutoProcessor) if vision else (AutoModelForCausalLM, AutoTokenizer)
        try:
            model, read = automatic.from_pretrained(name, dtype=kind), reader.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(
                f"cannot load --model {name!r}: {first_line(error)} (give a folder or a Hugging Face id of a "
                f"{'vision-language' if vision else 'causal language'} model)"
            ) from error
    model = model.to(where).eval()
    return Loaded(model, read.tokenizer, name, read) if vision else Loaded(model, read, name)


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
        raise InputError(f"--device {name!r} cannot be used: {first_line(error)}") from error
    return device


@contextmanager
def _quiet() -> Iterator[None]:
    """Turns off transformers' own progress bars and warnings: the command line has its own."""
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
