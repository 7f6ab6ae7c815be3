"""The compiled operations of ``csrc/``: loaded at the first call, then called. Contracts: `mixkv.ops.reference`.

Nothing here fails an import: without a library `why_not` and `status` say why. ``MIXKV_BACKEND=torch`` never loads a library
(``MIXKV_BACKEND=native`` makes `dispatch.choose` insist on one).
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from . import build, fakes, layout, selection_reference
from .arguments import ChosenChunks, LogitOptions, Packed, RaggedBuffers
from .selection_reference import Largest

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Status:
    """What became of a library.

    Attributes:
        available: whether its operations can be called.
        path: the file, where there is one.
        built: ``prebuilt`` (came with the package), ``cached`` (built at an earlier first use) or ``now``.
        reason: why it is not available.
        detail: the instruction set in use (CPU).
    """

    available: bool
    path: Path | None = None
    built: str | None = None
    reason: str | None = None
    detail: str | None = None


_lock = threading.RLock()
_statuses: dict[str, Status] = {}


def status(device: str = "cpu", *, load: bool = True) -> Status:
    """What became of the library for ``cpu`` or ``cuda``; finds (or builds) and loads it at the first call.

    With ``load=False`` nothing is built or loaded: the state so far.
    """
    known = _statuses.get(device)
    if known is not None:
        return known
    if not load:
        return Status(False, reason="not loaded yet")
    with _lock:
        if device not in _statuses:
            _statuses[device] = _load(device)
    return _statuses[device]


def why_not(device: torch.device, dtype: torch.dtype, key_size: int, value_size: int) -> str | None:
    """Why the compiled operations cannot take a store of this device, dtype and head sizes; None if they can."""
    if device.type not in build.DEVICES:
        return f"there are compiled operations for CPU and CUDA, not for {device.type}"
    if dtype not in _DTYPES:
        return f"they take float32, float16 and bfloat16, not {dtype}"
    if key_size % 16 or value_size % 16 or not (0 < key_size <= 256 and 0 < value_size <= 256):
        return f"head sizes must be multiples of 16 up to 256, not {key_size} and {value_size}"
    found = status(device.type)
    return None if found.available else found.reason


def describe(device: str) -> str:
    """How the library for ``cpu`` or ``cuda`` came about, for people."""
    found = status(device)
    kind = f", {found.detail}" if found.detail else ""
    return f"{found.built}{kind}, {found.path}"


def append(
    buffers: RaggedBuffers, key: torch.Tensor, value: torch.Tensor, position: int, valid: torch.Tensor | None = None
) -> None:
    """`reference.append`."""
    operations().append.default(*buffers, key, value, position, valid)


def attend(
    query: torch.Tensor,
    buffers: RaggedBuffers,
    logits: LogitOptions,
    *,
    max_length: int,
    stride: int | None = None,
    packed: Packed | None = None,
) -> torch.Tensor:
    """`reference.attend`; ``stride`` makes no difference. A sequence without rows gives zeros."""
    return operations().attend.default(query, *_store(buffers), *_packed(packed), max_length, *_logits(logits))


def append_attend(
    query: torch.Tensor,
    buffers: RaggedBuffers,
    key: torch.Tensor,
    value: torch.Tensor,
    position: int,
    logits: LogitOptions,
    *,
    max_length: int,
    stride: int | None = None,
    packed: Packed | None = None,
    rotate: bool = False,
) -> torch.Tensor:
    """`reference.append_attend`, in one call; ``stride`` makes no difference."""
    new = (key, value, position, rotate)
    return operations().append_attend.default(query, *buffers, *_packed(packed), *new, max_length, *_logits(logits))


def attend_extend(
    query: torch.Tensor,
    buffers: RaggedBuffers,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    logits: LogitOptions,
    *,
    mask: torch.Tensor | None,
    max_length: int,
    stride: int | None = None,
    packed: Packed | None = None,
) -> torch.Tensor:
    """`reference.attend_extend`; ``stride`` makes no difference. A query that sees nothing gets zeros."""
    store = (*_store(buffers), *_packed(packed))
    return operations().attend_extend.default(query, *store, new_key, new_value, mask, max_length, *_logits(logits))


def chunk_scores(
    query: torch.Tensor, codes: torch.Tensor, grid: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor, *, longest: int
) -> torch.Tensor:
    """`reference.chunk_scores`."""
    return operations().chunk_scores.default(query, codes, grid, starts, counts, longest)


def attend_chunks(
    query: torch.Tensor, buffers: RaggedBuffers, chunks: ChosenChunks, logits: LogitOptions, *, max_length: int
) -> torch.Tensor:
    """`reference.attend_chunks`, each chunk read where it lies. A sequence without rows gives zeros."""
    return operations().attend_chunks.default(query, *_store(buffers), *chunks, max_length, *_logits(logits))


def fetch_chunks(
    buffers: tuple[torch.Tensor, torch.Tensor],
    from_buffers: tuple[torch.Tensor, torch.Tensor],
    from_rows: torch.Tensor,
    to_rows: torch.Tensor,
    rows: torch.Tensor,
    *,
    chunk: int,
) -> None:
    """`reference.fetch_chunks` to a GPU, which reads the host's pinned memory itself: nothing waits to know which chunks."""
    operations().fetch_chunks.default(*buffers, *from_buffers, from_rows, to_rows, rows, chunk)


def compact(buffers: RaggedBuffers, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> None:
    """`reference.compact`."""
    lengths = buffers.lengths
    offsets = lengths.cumsum(0, dtype=lengths.dtype) - lengths
    operations().compact.default(*buffers, offsets, key, value, positions)


def move_rows(buffers: RaggedBuffers, source: RaggedBuffers, *, max_length: int) -> None:
    """`reference.move_rows`; ``max_length`` is at least ``buffers.lengths.max()`` (host)."""
    moved = (source.key, source.value, source.position, source.starts, source.key_scale, source.value_scale)
    operations().move_rows.default(*buffers, *moved, max_length)


def places(score: torch.Tensor) -> torch.Tensor:
    """`selection_reference.places` of float32 on the CPU: sorted by radix where all scores of a head differ."""
    found, tied = operations().places.default(score)
    for row, heads in enumerate(tied.tolist()):
        for head, is_tied in enumerate(heads):
            if is_tied:
                found[row, head] = selection_reference.places(score[row : row + 1, head : head + 1])[0, 0]
    return found


def ada_counts(importance: torch.Tensor, base: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """`selection_reference.ada_counts` on the CPU."""
    return operations().ada_counts.default(importance, base, totals)


def take(
    ranks: torch.Tensor, entries: torch.Tensor, window: torch.Tensor | None, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`selection_reference.take` on the CPU."""
    return operations().take.default(ranks, entries, None if window is None else window.expand(*ranks.shape[:2], width), width)


def gather(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    *,
    codes: bool = False,
    rotate: bool = False,
    pack: bool = False,
) -> RaggedBuffers:
    """`selection_reference.gather`: on the CPU in one pass. Of rotated rows only there.

    A scale of rotated rows may be the next float16, as sums are taken in another order.
    """
    if not key.is_cuda:
        format = (codes, rotate, pack, layout.SPARE_ROWS, layout.SPARE_SHARE)
        return _buffers(*operations().gather.default(key, value, positions, counts, *format))
    total = positions.numel()
    spare = layout.spare_per_sequence(total, counts.numel())
    buffers = layout.empty_buffers(counts.flatten(), total, spare, (key, value), codes=codes)
    compact(buffers, key, value, positions)
    return buffers


def evict(buffers: RaggedBuffers, ranks: torch.Tensor, quota: torch.Tensor, tail: int) -> tuple[RaggedBuffers, torch.Tensor]:
    """`selection_reference.evict` on the CPU, in one pass."""
    *new, left = operations().evict.default(*buffers, ranks, quota, tail, layout.SPARE_ROWS, layout.SPARE_SHARE)
    return _buffers(*new), left


def merge_largest(
    so_far: Largest,
    importance: torch.Tensor,
    own_totals: torch.Tensor,
    totals: torch.Tensor,
    base: torch.Tensor,
    candidates: torch.Tensor,
    least: torch.Tensor,
    limit: torch.Tensor,
    floor: float,
) -> Largest:
    """`selection_reference.merge_largest` on the CPU."""
    value, owner, _, within, _ = so_far
    shares = (own_totals, totals, base, candidates, least, limit, floor)
    return Largest(*operations().merge_largest.default(value, owner, within, importance, *shares))


def _load(device: str) -> Status:
    if os.environ.get("MIXKV_BACKEND") == "torch":
        return Status(False, reason="MIXKV_BACKEND=torch")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < build.TARGET:
        return Status(False, reason=f"torch {torch.__version__} is older than {build.TARGET[0]}.{build.TARGET[1]}")
    if device == "cuda":
        if not torch.cuda.is_available():
            return Status(False, reason="torch sees no GPU")
        # The schemas are in the CPU library.
        base = status("cpu")
        if not base.available:
            return Status(False, reason=f"the CPU library is missing: {base.reason}")
    try:
        path, built = build.find(device)
    except (build.BuildError, OSError) as error:
        return Status(False, reason=str(error))
    try:
        torch.ops.load_library(str(path))
        detail = _detail(path) if device == "cpu" else None
        if device == "cpu":
            fakes.register()
    except Exception as error:
        warnings.warn(f"mixkv: {path} cannot be loaded, plain torch is used instead: {error}", stacklevel=2)
        return Status(False, path, built, f"cannot be loaded: {error}")
    return Status(True, path, built, detail=detail)


def _detail(path: Path) -> str:
    name = ctypes.CDLL(str(path)).mixkv_cpu_kernels
    name.restype = ctypes.c_char_p
    return name().decode()


@functools.cache
def operations():
    """``torch.ops.mixkv``.

    Raises:
        RuntimeError: they are not available.
    """
    if not status("cpu").available:
        raise RuntimeError(f"the compiled operations are not available: {status('cpu').reason}")
    return torch.ops.mixkv


def _store(buffers: RaggedBuffers) -> tuple[torch.Tensor | None, ...]:
    """What attention reads of a store."""
    return buffers.key, buffers.value, buffers.starts, buffers.lengths, buffers.key_scale, buffers.value_scale


def _packed(packed: Packed | None) -> tuple[torch.Tensor | None, ...]:
    return (None,) * 6 if packed is None else _store(packed.buffers)


def _buffers(*parts: torch.Tensor) -> RaggedBuffers:
    """The buffers that an operation returned; without codes it returns empty scales."""
    return RaggedBuffers(*(parts if parts[0].dtype in (torch.int8, torch.uint8) else parts[:5]))


def _logits(options: LogitOptions) -> tuple[float, float, torch.Tensor | None]:
    return options.scaling, options.softcap or 0.0, float_sinks(options.sinks)


def float_sinks(sinks: torch.Tensor | None) -> torch.Tensor | None:
    return None if sinks is None else sinks.detach().float().contiguous()
