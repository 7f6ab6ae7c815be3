"""Which back end runs unasked on a GPU: the fastest that passes a trial there, once a machine, torch, library, dtype and head sizes.

Every candidate is checked against plain torch and timed in a process of its own (`mixkv.ops.trial`): what crashes or hangs there
does no harm here. The outcome is kept in the cache folder. ``MIXKV_BACKEND`` and ``MixKVConfig(backend=...)`` ask for a back end
by name: then there is no trial.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import build

# In the order in which they are tried; the last is what the others fall back to.
CANDIDATES = ("native", "varlen", "flash", "torch")
# Seconds that one candidate may take to start, to be checked and to be timed.
LIMIT = 90.0
# A trial's own account of how long its timing took may be so much too short: a share, and seconds.
_TOLERANCE, _SLACK = 0.5, 0.25


class Place(NamedTuple):
    """What a back end is chosen for: a store of this dtype and these head sizes on this device."""

    device: torch.device
    dtype: torch.dtype
    key_size: int
    value_size: int

    @property
    def name(self) -> str:
        """The machine, torch, the library, and the store, in words."""
        from .. import __version__

        machine = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        with contextlib.suppress(build.BuildError):
            return (
                f"{machine}, torch {torch.__version__}, mixkv {__version__} {build.source_hash(self.device.type)}, {self.store}"
            )
        return f"{machine}, torch {torch.__version__}, mixkv {__version__}, {self.store}"

    @property
    def store(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.key_size}/{self.value_size}"


class Outcome(NamedTuple):
    """How a candidate did.

    Attributes:
        result: ``passed``, ``failed``, ``unavailable`` (it cannot be used here), or ``not checked`` (its process could not start).
        reason: of everything but ``passed``.
        microseconds: of a decode step over a small and a large batch, where it passed.
        checks: comparisons with plain torch.
    """

    result: str
    reason: str | None = None
    microseconds: float | None = None
    checks: int = 0


_chosen: dict[Place, str] = {}
_lock = threading.Lock()


def choice(place: Place) -> str:
    """The fastest candidate that passed its trial for ``place``, ``torch`` if none did; the trials run where they are not known."""
    with _lock:
        if place not in _chosen:
            _chosen[place] = fastest(outcomes(place))
        return _chosen[place]


def fastest(found: dict[str, Outcome]) -> str:
    """The candidate of the least time among those that passed; ``torch`` where there is none."""
    passed = {name: outcome.microseconds for name, outcome in found.items() if outcome.result == "passed"}
    return min(passed, key=lambda name: passed[name] or 0.0) if passed else "torch"


def known(place: Place) -> dict[str, Outcome] | None:
    """The outcomes that are kept for ``place``; None: there are none."""
    try:
        kept = json.loads(path().read_text())[place.name]
        return {name: Outcome(*outcome) for name, outcome in kept.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def path() -> Path:
    """The file of all outcomes. Without it everything is tried again."""
    return build.cache_folder() / "back_ends.json"


def outcomes(place: Place) -> dict[str, Outcome]:
    """The outcome of every candidate for ``place``: those that are kept, else those of trials that run now."""
    found = known(place)
    if found is not None:
        return found
    with _exclusively():
        # Another process may have tried them meanwhile.
        found = known(place)
        if found is not None:
            return found
        print(f"mixkv: checking what can be used on {place.name}, once; this takes a minute", file=sys.stderr, flush=True)
        found = {name: trial(name, place) for name in CANDIDATES}
        for name, outcome in found.items():
            if outcome.result == "failed":
                warnings.warn(f"mixkv: back end {name} failed its check and is not used: {outcome.reason}", stacklevel=2)
        # What could not be checked now may be another time.
        if all(outcome.result != "not checked" for outcome in found.values()):
            _keep(place, found)
    return found


def trial(name: str, place: Place, limit: float = LIMIT) -> Outcome:
    """Checks and times one candidate in a process of its own."""
    missing = _library_missing(name, place)
    if missing is not None:
        return Outcome("unavailable", missing)
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(
                _command(name, place),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            return Outcome("not checked", f"its process could not be started: {error}")
        events, hung = _events(process, limit)
        errors.seek(0)
        last = next((line.strip() for line in reversed(errors.read().splitlines()) if line.strip()), "")
    return _outcome(events, process.returncode, hung, limit, last)


def report(place: Place) -> list[str]:
    """What is known for ``place``, a line each."""
    found = known(place)
    if found is None:
        return [f"cuda: the back ends have not been checked yet for {place.store}: the first prompt does, or mixkv build"]
    lines = [f"cuda: back end {fastest(found)} for {place.store} (checked; {path()})"]
    for name, outcome in found.items():
        times = "" if outcome.microseconds is None else f", {outcome.microseconds:.0f} us a step"
        reason = "" if outcome.reason is None else f": {outcome.reason}"
        lines.append(f"cuda: {name} {outcome.result}{times}{reason}")
    return lines


def _command(name: str, place: Place) -> list[str]:
    dtype = str(place.dtype).removeprefix("torch.")
    arguments = (name, str(place.device), dtype, str(place.key_size), str(place.value_size))
    return [sys.executable, "-m", "mixkv.ops.trial", *arguments]


def _environment() -> dict[str, str]:
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _library_missing(name: str, place: Place) -> str | None:
    """Builds the compiled operations where they are tried, outside the time of the trial; why there are none."""
    if name != "native" or place.device.type not in build.DEVICES:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for device in dict.fromkeys(("cpu", place.device.type)):
                build.find(device)
    except (build.BuildError, OSError) as error:
        return str(error)
    return None


def _events(process: subprocess.Popen, limit: float) -> tuple[dict[str, dict[str, Any]], bool]:
    """The last of each kind of line that ``process`` wrote, ``at`` by this process's clock; and whether it had to be ended."""
    lines: queue.Queue[tuple[float, str] | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put((time.perf_counter(), line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    events: dict[str, dict[str, Any]] = {}
    deadline, hung = time.monotonic() + limit, False
    try:
        while (item := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                event = json.loads(item[1])
                events[event["event"]] = {**event, "at": item[0]}
        process.wait(timeout=max(0.1, deadline - time.monotonic()))
    except (queue.Empty, subprocess.TimeoutExpired):
        hung = True
    finally:
        if process.poll() is None:
            _end(process)
    return events, hung


def _end(process: subprocess.Popen) -> None:
    """Ends ``process`` and what it has started."""
    with contextlib.suppress(OSError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _outcome(events: dict[str, dict[str, Any]], code: int, hung: bool, limit: float, last: str) -> Outcome:
    if "started" not in events:
        return Outcome("not checked", f"its process did not start: {'no answer' if hung else last}")
    if "unavailable" in events:
        return Outcome("unavailable", str(events["unavailable"]["reason"]))
    stage = "being timed" if "timing" in events else "being checked"
    if hung:
        return Outcome("failed", f"it did not end within {limit:.0f} s while {stage}")
    if code:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return Outcome("failed", f"it ended with {how} while {stage}" + (f": {last}" if last else ""))
    checked, timing, timed = (events.get(kind) for kind in ("checked", "timing", "timed"))
    for found in (checked, timed):
        if found is not None and found["failures"]:
            more = len(found["failures"]) - 1
            return Outcome("failed", found["failures"][0] + (f", and {more} more" if more else ""))
    if checked is None or timing is None or timed is None:
        return Outcome("failed", f"it ended while {stage}")
    took, said = timed["at"] - timing["at"], timed["elapsed"]
    if said < _TOLERANCE * took - _SLACK or timed["seconds"] * timed["steps"] > said:
        return Outcome("failed", f"it said that its timing took {said:.2f} s, and it took {took:.2f} s")
    return Outcome("passed", None, 1e6 * timed["seconds"], checked["count"])


def _keep(place: Place, found: dict[str, Outcome]) -> None:
    try:
        kept = json.loads(path().read_text())
    except (OSError, ValueError):
        kept = {}
    kept = kept if isinstance(kept, dict) else {}
    kept[place.name] = found
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        partial = path().with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(kept, indent=1) + "\n")
        os.replace(partial, path())
    except OSError as error:
        warnings.warn(f"mixkv: {path()} cannot be written ({error}): the back ends are checked again next time", stacklevel=2)


@contextlib.contextmanager
def _exclusively() -> Iterator[None]:
    """Of several processes of a machine, one tries the candidates and the others wait for the outcome."""
    with contextlib.ExitStack() as stack:
        # Without a lock everything is tried more than once.
        with contextlib.suppress(OSError, build.BuildError):
            path().parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(build.exclusively(path().with_suffix(".lock"), len(CANDIDATES) * LIMIT))
        yield
