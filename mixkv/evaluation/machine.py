"""The environment of a measurement: versions, processor, threads, and the load from other processes."""

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
    """Versions of Python and of the relevant packages; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "mixkv": __version__}


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """System, processor, cores, threads and GPU."""
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
    }


class Others:
    """Measures the CPU time of other processes, from its creation on."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = perf_counter(), _busy_seconds(), process_time()

    def cores(self) -> float | None:
        """The number of cores that they used on average; None if the system does not report it."""
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        return max(0.0, (busy - self.busy - (process_time() - self.own)) / (perf_counter() - self.began))


def crowded(others: float | None) -> str | None:
    """A warning if this process had to share its cores, of which other processes used ``others``; else None.

    Threads that share cores wait for each other at the end of each parallel operation. That slows the many small operations
    of uncompressed attention several times, but compressed attention hardly, so that ratios look far better than they are.
    """
    cores, threads = _cores(), torch.get_num_threads()
    if others is None or threads == 1 or others < 0.2 or threads + others < cores + 0.2:
        return None
    return (
        f"Other processes used {others:.1f} of the {cores} cores: with {threads} threads, ratios of times on the CPU are not reliable "
        f"(steps of the full cache look too slow). Run again on an idle machine, or with --threads 1"
    )


def _busy_seconds() -> float | None:
    """CPU time of all processes so far, summed over the cores."""
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
