"""Modules under the names that they had before: pickles and imports that name them keep working."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Former name -> present name, below this package.
_MOVED = {
    "attention": "hf.attention",
    "binding": "hf.binding",
    "bounds": "storage.chunk_bounds",
    "chunks": "storage.chunks",
    "compat": "hf.versions",
    "compression": "cache.compress",
    "contest": "selection.global_budget",
    "document.model": "evaluation.document_model",
    "evaluation.models": "evaluation.loading",
    "headprofile": "head_profile",
    "hybrid": "selection.hybrid",
    "kernels": "ops.dispatch",
    "layer": "cache.layer",
    "modality": "hf.image_tokens",
    "native": "ops.native",
    "parallel": "tensor_parallel",
    "plain": "ops.reference",
    "projection": "hf.output_projection",
    "ragged": "storage.ragged",
    "report": "cache.stats",
    "savefile": "checked_file",
    "saving": "cache.save",
    "scores": "selection.scores",
    "shared": "cache.state",
    "slots": "storage.chunk_slots",
    "stockstate": "hf.stock_layers",
    "varlen": "ops.flash",
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path=None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        return ModuleSpec(name, self) if package == __package__ and rest in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = importlib.import_module(f"{__package__}.{_MOVED[name.partition('.')[2]]}")


def install() -> None:
    """Makes the former names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def module(name: str) -> ModuleType:
    """The module that was an attribute of this package under ``name``.

    Raises:
        AttributeError: there was none.
    """
    if name not in _MOVED:
        raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__package__}.{_MOVED[name]}")
