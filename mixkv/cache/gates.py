"""The gate that ``score="gate"`` uses for a model: given, shipped with the package, kept from an earlier use, or made."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import gate_file, tensor_parallel
from ..gate_file import Gate
from ..hf import binding
from ..ops.build import cache_folder

_SHIPPED = Path(__file__).parents[1] / "gates"

# Fits a gate to a model and writes it to a file: `mixkv.calibrate`, which is built on caches, adds it.
MAKERS: list[Callable[[PreTrainedModel, Path], None]] = []

# What has been found, by model and by the path that was given.
_known: weakref.WeakKeyDictionary[nn.Module, dict[str | None, Gate]] = weakref.WeakKeyDictionary()


def of_model(model: PreTrainedModel, path: str | None) -> Gate:
    """The gate in the file ``path``; None: one that comes with the package, or was kept, or is made now and kept.

    Raises:
        ValueError: the gate at ``path`` is another model's, or none can be made.
    """
    known = _known.setdefault(model, {})
    if path not in known:
        modules = compressed_modules(model)
        ours = gate_file.probe(modules)
        known[path] = _find(model, ours, len(modules)) if path is None else _given(path, ours, len(modules))
    return known[path]


def compressed_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Layer index -> attention module of the layers that are compressed.

    Raises:
        ValueError: the model cannot be compressed, or is tensor-parallel.
    """
    slots, modules = binding.slots(model), binding.attention_modules(model)
    if any(map(tensor_parallel.is_spread, modules.values())):
        raise ValueError("score='gate' does not work with tensor parallelism: use another score, or one process")
    return {index: modules[index] for index, slot in enumerate(slots) if slot is None}


def kept_path(model: PreTrainedModel) -> Path:
    """Where the gate of a model is kept."""
    folder = cache_folder() / "gates"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{_digest(gate_file.probe(compressed_modules(model)))}.safetensors"


def _given(path: str, ours: Mapping[str, torch.Tensor], layers: int) -> Gate:
    gate = gate_file.load(path)
    if not gate.fits(ours, layers):
        raise ValueError(
            f"the gate in {path} was fitted to another model (a {gate.about.get('model')} of {len(gate.layers)} compressed layers): fit "
            f"one to this model with mixkv.calibrate, or leave gate out"
        )
    return gate


def _find(model: PreTrainedModel, ours: Mapping[str, torch.Tensor], layers: int) -> Gate:
    shipped = [gate_file.load(file) for file in sorted(_SHIPPED.glob("*.safetensors"))]
    nearest = min(shipped, key=lambda gate: gate.distance(ours, layers), default=None)
    if nearest is not None and nearest.fits(ours, layers):
        return nearest
    path = kept_path(model)
    if not path.is_file():
        MAKERS[-1](model, path)
    return gate_file.load(path)


def _digest(values: Mapping[str, torch.Tensor]) -> str:
    """A name for the weights that ``values`` are of."""
    digest = hashlib.sha256()
    for name, tensor in sorted(values.items()):
        digest.update(name.encode())
        digest.update(tensor.to(torch.bfloat16).view(torch.int16).numpy())
    return digest.hexdigest()[:16]
