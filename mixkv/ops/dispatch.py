"""The operations on ragged storage, each by the best back end at hand. Contracts: `mixkv.ops.reference`, the ground truth.

Back ends: ``native`` (csrc/, CPU and CUDA), ``varlen`` (torch's variable-length flash attention, torch >= 2.12, GPU),
``flash`` (the flash-attn package, GPU), ``torch`` (plain torch: padded SDPA). The choice: ``MixKVConfig(backend=...)``, else
the environment's ``MIXKV_BACKEND``, else on a CPU the first in this order that can take the store's dtype and head sizes, and
on an NVIDIA GPU the fastest of those that have passed their checks there (`mixkv.ops.checked`). What ``varlen`` and ``flash`` do
not have, plain torch does.
"""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import Any

import torch

from ..registry import BACKENDS
from . import (
    checked,
    flash,
    mixing_reference,
    native,
    native_scores,
    reference,
    score_reference,
    selection_reference,
)
from .arguments import ChosenChunks, LogitOptions, Packed, RaggedBuffers
from .selection_reference import Largest


def choose(
    requested: str, device: torch.device, dtype: torch.dtype, key_size: int, value_size: int, *, codes: bool = False
) -> str:
    """The back end for a store of this device, dtype and head sizes.

    Args:
        requested: a name from `mixkv.registry.BACKENDS`; ``auto`` asks the environment, then takes the first that works.
        codes: rows are in int8, and ``dtype`` is that of queries and new rows.

    Raises:
        ValueError: the back end asked for cannot be used; the message says why.
    """
    if requested == "auto":
        requested = os.environ.get("MIXKV_BACKEND", "auto")
    if requested not in BACKENDS:
        raise ValueError(f"unknown MIXKV_BACKEND={requested!r}; choose from {', '.join(BACKENDS)}")
    if requested == "auto":
        if device.type == "cpu":
            return "torch" if native.why_not(device, dtype, key_size, value_size) else "native"
        if codes or device.type != "cuda":
            return "torch"
        place = checked.Place(device, dtype, key_size, value_size)
        chosen = checked.choice(place)
        return chosen if why_not(chosen, *place) is None else "torch"
    reason = why_not(requested, device, dtype, key_size, value_size, codes=codes)
    if reason is not None:
        raise ValueError(f"backend={requested!r} cannot be used: {reason}. Leave it at 'auto', or use 'torch'")
    return requested


def choose_again(
    former: str, device: torch.device, dtype: torch.dtype, key_size: int, value_size: int, *, codes: bool = False
) -> str:
    """The back end for a store of another process or machine, which had chosen ``former``: that one if it can be used here.

    Raises:
        ValueError: it cannot, and the environment asks for one that cannot be used either.
    """
    place = (device, dtype, key_size, value_size)
    return former if why_not(former, *place, codes=codes) is None else choose("auto", *place, codes=codes)


def why_not(
    name: str, device: torch.device, dtype: torch.dtype, key_size: int, value_size: int, *, codes: bool = False
) -> str | None:
    """Why back end ``name`` cannot hold such a store; None if it can."""
    if name == "torch":
        return None
    if codes and (name != "native" or device.type != "cpu"):
        return "it has no operations on rows of codes" + (f" for {device.type}" if name == "native" else "")
    if name == "native":
        return native.why_not(device, dtype, key_size, value_size)
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs half precision, not {dtype}"
    if key_size != value_size or key_size > 256:
        return f"it needs equal head sizes up to 256, not {key_size} and {value_size}"
    if name == "varlen":
        release = tuple(int(part) for part in torch.__version__.split(".")[:2])
        return None if release >= (2, 12) else f"it needs torch >= 2.12, not {torch.__version__}"
    return None if importlib.util.find_spec("flash_attn") else "flash-attn is not installed: pip install 'mixkv[flash]'"


_ATTEND = {"native": native.attend, "varlen": flash.torch_attend, "flash": flash.flash_attend, "torch": reference.attend}


def append(
    backend: str,
    buffers: RaggedBuffers,
    key: torch.Tensor,
    value: torch.Tensor,
    position: int,
    valid: torch.Tensor | None = None,
) -> None:
    """`reference.append`: rows ``key`` [B, Hkv, n, D] and ``value`` [B, Hkv, n, Dv]."""
    _rows(backend).append(buffers, key, value, position, valid)


def attend(
    backend: str,
    query: torch.Tensor,
    buffers: RaggedBuffers,
    logits: LogitOptions,
    *,
    max_length: int,
    stride: int | None,
    packed: Packed | None = None,
) -> torch.Tensor:
    """`reference.attend`: ``query`` [B, Hq, 1, D] to [B, 1, Hq, Dv]."""
    return _ATTEND[backend](query, buffers, logits, max_length=max_length, stride=stride, **_packed(packed))


def append_attend(
    backend: str,
    query: torch.Tensor,
    buffers: RaggedBuffers,
    key: torch.Tensor,
    value: torch.Tensor,
    position: int,
    logits: LogitOptions,
    *,
    max_length: int,
    stride: int | None,
    packed: Packed | None = None,
    rotate: bool = False,
) -> torch.Tensor:
    """`reference.append_attend`: rows ``key`` [B, Hkv, 1, D], then ``query`` [B, Hq, 1, D] to [B, 1, Hq, Dv]."""
    extent: dict[str, Any] = {"max_length": max_length, "stride": stride, **_packed(packed)}
    if backend == "native" or rotate:
        return _rows(backend).append_attend(query, buffers, key, value, position, logits, rotate=rotate, **extent)
    reference.append(buffers, key, value, position)
    return _ATTEND[backend](query, buffers, logits, **extent)


def attend_extend(
    backend: str,
    query: torch.Tensor,
    buffers: RaggedBuffers,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    logits: LogitOptions,
    *,
    mask: torch.Tensor | None,
    max_length: int,
    stride: int | None,
    packed: Packed | None = None,
) -> torch.Tensor:
    """`reference.attend_extend`: ``query`` [B, Hq, n, D], new rows [B, Hkv, n, D] to [B, n, Hq, Dv]."""
    extent: dict[str, Any] = {"max_length": max_length, "stride": stride, **_packed(packed)}
    return _rows(backend).attend_extend(query, buffers, new_key, new_value, logits, mask=mask, **extent)


def chunk_scores(
    backend: str,
    query: torch.Tensor,
    codes: torch.Tensor,
    grid: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    *,
    longest: int,
) -> torch.Tensor:
    """`reference.chunk_scores`: ``query`` [B, Hq, 1, D], ``codes`` [chunks, D] to [S, longest]."""
    return _rows(backend).chunk_scores(query, codes, grid, starts, counts, longest=longest)


def attend_chunks(
    backend: str,
    query: torch.Tensor,
    buffers: RaggedBuffers,
    chunks: ChosenChunks,
    logits: LogitOptions,
    *,
    max_length: int,
) -> torch.Tensor:
    """`reference.attend_chunks`: ``query`` [B, Hq, 1, D] to [B, 1, Hq, Dv]."""
    return _rows(backend).attend_chunks(query, buffers, chunks, logits, max_length=max_length)


def fetch_chunks(
    backend: str,
    buffers: tuple[torch.Tensor, torch.Tensor],
    from_buffers: tuple[torch.Tensor, torch.Tensor],
    from_rows: torch.Tensor,
    to_rows: torch.Tensor,
    rows: torch.Tensor,
    *,
    chunk: int,
) -> None:
    """`reference.fetch_chunks`, ``from_rows``, ``to_rows``, ``rows`` [S, K]; compiled for a GPU only."""
    compiled = backend == "native" and buffers[0].is_cuda
    (native if compiled else reference).fetch_chunks(buffers, from_buffers, from_rows, to_rows, rows, chunk=chunk)


def gather(
    backend: str,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    *,
    codes: bool = False,
    rotate: bool = False,
    pack: bool = False,
) -> RaggedBuffers:
    """`selection_reference.gather`: ``key`` [B, Hkv, N, D], ``positions`` int32 [rows], ``counts`` int64 [B, Hkv].

    Of rotated rows it is compiled for the CPU only.
    """
    compiled = backend == "native" and (key.device.type == "cpu" or not rotate)
    operation = (native if compiled else selection_reference).gather
    return operation(key, value, positions, counts, codes=codes, rotate=rotate, pack=pack)


def move_rows(backend: str, buffers: RaggedBuffers, source: RaggedBuffers, *, total: int, max_length: int) -> None:
    """`reference.move_rows`; ``max_length`` is at least ``buffers.lengths.max()`` (host)."""
    if backend == "native":
        native.move_rows(buffers, source, max_length=max_length)
    else:
        reference.move_rows(buffers, source, total=total)


def window_attention(
    backend: str, query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, logits: LogitOptions, **options: str
) -> torch.Tensor:
    """`score_reference.window_attention`: compiled where queries and keys have one dtype."""
    compiled = backend == "native" and query.dtype == key.dtype
    return (native_scores if compiled else score_reference).window_attention(query, key, valid, logits, **options)


def importance(
    backend: str, query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, logits: LogitOptions, **options: Any
) -> torch.Tensor:
    """`score_reference.importance`; as all that follows compiled for the CPU only: a GPU multiplies matrices at full speed."""
    if query.dtype == key.dtype and _scores(backend, key) is native_scores:
        return native_scores.importance(query, key, valid, logits, **options)
    return score_reference.importance(query, key, valid, logits, **options, attend=partial(window_attention, backend))


def norm(backend: str, rows: torch.Tensor) -> torch.Tensor:
    """`score_reference.norm`."""
    return _scores(backend, rows).norm(rows)


def diversity(backend: str, key: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`score_reference.diversity`."""
    return _scores(backend, key).diversity(key, valid)


def match(backend: str, raw: torch.Tensor, reference: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """`mixing_reference.match`: compiled for float32."""
    alike = raw.dtype == reference.dtype == torch.float32 and raw.shape == reference.shape
    return (_mixing(backend, raw) if alike else mixing_reference).match(raw, reference, valid)


def mix(
    backend: str,
    importance: torch.Tensor,
    similarity: torch.Tensor,
    value_norm: torch.Tensor,
    share: torch.Tensor,
    valid: torch.Tensor | None,
) -> torch.Tensor:
    """`mixing_reference.mix`."""
    return _mixing(backend, importance).mix(importance, similarity, value_norm, share, valid)


def normalized(importance: torch.Tensor, exponent: float) -> torch.Tensor:
    """`mixing_reference.normalized`, compiled where the library has been loaded."""
    compiled = importance.device.type == "cpu" and native.status("cpu", load=False).available
    return (native_scores if compiled else mixing_reference).normalized(importance, exponent)


def evict(
    backend: str, buffers: RaggedBuffers, ranks: torch.Tensor, quota: torch.Tensor, tail: int
) -> tuple[RaggedBuffers, torch.Tensor]:
    """`selection_reference.evict`."""
    compiled = backend == "native" and ranks.device.type == "cpu"
    return (native if compiled else selection_reference).evict(buffers, ranks, quota, tail)


def places(score: torch.Tensor) -> torch.Tensor:
    """`selection_reference.places`; as all that follows compiled where the library has been loaded: both give the same."""
    return _selection(score).places(score)


def ada_counts(importance: torch.Tensor, base: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """`selection_reference.ada_counts`."""
    return _selection(importance).ada_counts(importance, base, totals)


def take(
    ranks: torch.Tensor, entries: torch.Tensor, window: torch.Tensor | None, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`selection_reference.take`."""
    return _selection(ranks).take(ranks, entries, window, width)


def merge_largest(so_far: Largest, importance: torch.Tensor, *limits: torch.Tensor, floor: float) -> Largest:
    """`selection_reference.merge_largest`."""
    return _selection(importance).merge_largest(so_far, importance, *limits, floor)


def _packed(packed: Packed | None) -> dict[str, Packed]:
    """For back ends of which some take no codes."""
    return {} if packed is None else {"packed": packed}


def _rows(backend: str):
    return native if backend == "native" else reference


def _scores(backend: str, tensor: torch.Tensor):
    return native_scores if backend == "native" and tensor.device.type == "cpu" else score_reference


def _mixing(backend: str, tensor: torch.Tensor):
    return native_scores if backend == "native" and tensor.device.type == "cpu" else mixing_reference


def _selection(tensor: torch.Tensor):
    return native if tensor.device.type == "cpu" and native.status("cpu", load=False).available else selection_reference
