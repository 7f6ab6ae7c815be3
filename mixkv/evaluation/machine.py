"""What the numbers were measured on: versions, processor, threads, and what else ran there."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from time import perf_counter, process_time
from typing import Any

import torch

from .. import __version__

_PACKAGES = ("mixkv", "torch", "transformers", "tokenizers", "accelerate", "gguf", "rich")


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
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
    }


class Others:
    """Watches, from its making on, what other processes use of the processor."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = perf_counter(), _busy_seconds(), process_time()

    def cores(self) -> float | None:
        """How many cores they used on average; None where the system does not tell."""
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        return max(0.0, (busy - self.busy - (process_time() - self.own)) / (perf_counter() - self.began))


def crowded(others: float | None) -> str | None:
    """What to tell when this process had to share its cores, of which other processes used ``others``; None if it had not.

    Threads that share cores wait for each other at the end of each parallel operation. That slows the many small operations
    of uncompressed attention several times over and compressed attention hardly, so ratios look far better than they are.
    """
    cores, threads = _cores(), torch.get_num_threads()
    if others is None or threads == 1 or others < 0.2 or threads + others < cores + 0.2:
        return None
    return (
        f"Other processes used {others:.1f} of the {cores} cores meanwhile: with {threads} threads, ratios of times on the CPU are not to "
        f"be trusted (steps of the full cache look too slow). Run again on an idle machine, or with --threads 1"
    )


def _busy_seconds() -> float | None:
    """Processor time that all processes have used, summed over the cores."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
