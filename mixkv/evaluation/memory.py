"""Peak memory: on a GPU the memory that torch allocates, on Linux the resident memory of the process."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PEAK, _NOW = "VmHWM", "VmRSS"


def start(device: torch.device) -> int | None:
    """Starts a measurement and returns the bytes in use now, or None if the system does not report them.

    On a CPU, free memory is first returned to the system, so that it is not counted as memory in use. Allocating it again
    slows the work that follows a little.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            # Sets the peak to what is resident now; see proc(5).
            file.write("5")
    except OSError:
        return None
    return _status(_NOW)


def peak(device: torch.device, before: int | None) -> int | None:
    """The peak since `start` minus ``before``, the result of `start`, in bytes; None if that is None."""
    if before is None:
        return None
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status(_PEAK)
    # Linux counts resident pages in batches, so that the peak may be slightly below the start.
    return max(0, most - before)


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


class Allocations:
    """What torch's CPU allocator gave out within `allocations`: ``peak``, in bytes beyond what was in use before."""

    peak = 0


@contextmanager
def allocations() -> Iterator[Allocations]:
    """Counts the bytes that torch allocates on the CPU, those that operators allocate for themselves included.

    Memory that compiled operations of other libraries take for themselves is not seen: see `start`.
    """
    counted = Allocations()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield counted
    now = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            now += event.nbytes()
            counted.peak = max(counted.peak, now)
