"""The compiled operations of ``csrc/``: found, built at first use where there is a compiler, loaded, called.

Two libraries hold the same operations, ``libmixkv`` for the CPU and ``libmixkv_cuda`` for NVIDIA GPUs. Each is taken from the
package (built by setup.py) or from a cache folder, else built into that folder. They are written against torch's stable ABI:
one build serves every Python and every torch from 2.10 on. Nothing here fails an import: without a library `why_not` and
`status` say why.

Environment: ``MIXKV_BACKEND=torch`` never loads a library (``MIXKV_BACKEND=native`` makes `kernels.choose` insist on one);
``MIXKV_CACHE`` is the cache folder (default ``~/.cache/mixkv``); ``CXX``, ``NVCC`` the compilers, ``MIXKV_CXXFLAGS`` further flags;
``MIXKV_BUILD_TIMEOUT`` the seconds that a build may take.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The oldest torch whose ABI the libraries use, as `TORCH_TARGET_VERSION` wants it.
_TARGET = (2, 10)
_TARGET_FLAG = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-ignored-attributes"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Files that are compiled for one instruction set each; which one runs is decided when the library is loaded.
_TABLES = {"table_avx2.cpp": _AVX2, "table_avx512.cpp": _AVX512, "table_avx512_bf16.cpp": [*_AVX512, "-mavx512bf16"]}
_NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
_ARCHITECTURES = ("80", "86", "89", "90", "100")
_TIMEOUT = {"cpu": 300, "cuda": 1200}
_DEVICES = {"cpu": "libmixkv", "cuda": "libmixkv_cuda"}


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


class BuildError(RuntimeError):
    """A library could not be built; the message says why and what to do."""


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
    if device.type not in _DEVICES:
        return f"there are compiled operations for CPU and CUDA, not for {device.type}"
    if dtype not in _dtypes():
        return f"they take float32, float16 and bfloat16, not {dtype}"
    if any(size % 16 or not 0 < size <= 256 for size in (key_size, value_size)):
        return f"head sizes must be multiples of 16 up to 256, not {key_size} and {value_size}"
    found = status(device.type)
    return None if found.available else found.reason


def describe(device: str) -> str:
    """How the library for ``cpu`` or ``cuda`` came about, for people."""
    found = status(device)
    kind = f", {found.detail}" if found.detail else ""
    return f"{found.built}{kind}, {found.path}"


def append(buffers, starts, lengths, key, value, column, valid=None) -> None:
    """`plain.append`."""
    _ops().append.default(*buffers, starts, lengths, key, value, column, valid)


def attend(query, key, value, starts, lengths, *, max_length, stride=None, scaling, softcap=None, sinks=None) -> torch.Tensor:
    """`plain.attend`; ``stride`` makes no difference. A sequence without rows gives zeros."""
    return _ops().attend.default(query, key, value, starts, lengths, max_length, scaling, softcap or 0.0, _sinks(sinks))


def append_attend(
    query, buffers, starts, lengths, key, value, column, *, max_length, scaling, softcap=None, sinks=None
) -> torch.Tensor:
    """`append` of rows [B, Hkv, n, D] and then `attend`, in one call; ``max_length`` counts the new rows."""
    return _ops().append_attend.default(
        query, *buffers, starts, lengths, key, value, column, max_length, scaling, softcap or 0.0, _sinks(sinks)
    )


def attend_extend(
    query, key, value, starts, lengths, new_key, new_value, *, mask, max_length, stride=None, scaling, softcap=None, sinks=None
) -> torch.Tensor:
    """`plain.attend_extend`. A query that sees nothing gets zeros."""
    return _ops().attend_extend.default(
        query, key, value, starts, lengths, new_key, new_value, mask, max_length, scaling, softcap or 0.0, _sinks(sinks)
    )


def chunk_scores(query, codes, grid, starts, counts, *, longest) -> torch.Tensor:
    """`plain.chunk_scores`."""
    return _ops().chunk_scores.default(query, codes, grid, starts, counts, longest)


def attend_chunks(
    query,
    key,
    value,
    starts,
    lengths,
    chunk_key,
    chunk_value,
    blocks,
    block_rows,
    *,
    chunk,
    max_length,
    scaling,
    softcap=None,
    sinks=None,
) -> torch.Tensor:
    """`plain.attend_chunks`, each chunk read where it lies. A sequence without rows gives zeros."""
    store = (key, value, starts, lengths, chunk_key, chunk_value, blocks, block_rows)
    return _ops().attend_chunks.default(query, *store, chunk, max_length, scaling, softcap or 0.0, _sinks(sinks))


def fetch_chunks(buffers, from_buffers, from_rows, to_rows, rows, *, chunk) -> None:
    """`plain.fetch_chunks` to a GPU, which reads the host's pinned memory itself: nothing waits to know which chunks."""
    _ops().fetch_chunks.default(*buffers, *from_buffers, from_rows, to_rows, rows, chunk)


def compact(buffers, starts, lengths, key, value, positions) -> None:
    """Gathers the kept rows of full keys and values into flat storage.

    Args:
        buffers: ``(key, value, position)``, written.
        starts, lengths: int32 [S].
        key, value: [B, Hkv, N, D], [B, Hkv, N, Dv].
        positions: int32 [lengths.sum()], the kept columns, sequence after sequence.
    """
    offsets = (lengths.cumsum(0) - lengths).to(lengths.dtype)
    _ops().compact.default(*buffers, starts, lengths, offsets, key, value, positions)


def move_rows(buffers, starts, lengths, from_buffers, from_starts, *, max_length) -> None:
    """Copies sequences between buffers: growth, and taking batch rows (``from_starts`` may repeat or leave out sequences).

    Sequence s of ``buffers`` becomes the ``lengths[s]`` rows of ``from_buffers`` from ``from_starts[s]`` on. The buffers must
    not overlap.
    """
    _ops().move_rows.default(*buffers, starts, lengths, *from_buffers, from_starts, max_length)


def window_attention(
    query, key, valid, *, scaling, statistic="mean", group_reduce="mean", softcap=None, sinks=None
) -> torch.Tensor:
    """`scores.window_attention`, a few columns at a time instead of all logits at once."""
    if valid is not None:
        valid = valid.expand(key.shape[:3])
    return _ops().window_scores.default(
        query, key, valid, scaling, statistic == "rms", group_reduce == "max", softcap or 0.0, _sinks(sinks)
    )


def projected_norm(value, factor) -> torch.Tensor:
    """`scores.projected_norm` on the CPU, without storing what is projected."""
    return _ops().projected_norm.default(value, factor)


def build(out_dir: str | os.PathLike, cuda: bool = False) -> Path:
    """Builds the CPU library, and the CUDA library where ``cuda``, into a folder.

    torch is not imported: its headers are enough.

    Returns: the path of the CPU library.

    Raises:
        BuildError: no compiler, no torch, or the compiler's own message.
    """
    for device in ("cpu", "cuda") if cuda else ("cpu",):
        target = Path(out_dir) / f"{_DEVICES[device]}-{_source_hash(device)}.so"
        _compile(device, target, _timeout(device))
    return Path(out_dir) / f"{_DEVICES['cpu']}-{_source_hash('cpu')}.so"


def compiler(device: str = "cpu") -> str | None:
    """The path of the C++ compiler, or of nvcc."""
    if device == "cpu":
        names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    else:
        homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
        names = [os.environ.get("NVCC"), *(os.path.join(home, "bin", "nvcc") for home in homes if home), "nvcc"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def source_dir() -> Path | None:
    """``csrc/``: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next((path for path in (package / "csrc", package.parent / "csrc") if (path / "registration.cpp").is_file()), None)


def _load(device: str) -> Status:
    if os.environ.get("MIXKV_BACKEND") == "torch":
        return Status(False, reason="MIXKV_BACKEND=torch")
    torch = _torch()
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _TARGET:
        return Status(False, reason=f"torch {torch.__version__} is older than {_TARGET[0]}.{_TARGET[1]}")
    if device == "cuda":
        if not torch.cuda.is_available():
            return Status(False, reason="torch sees no GPU")
        # The schemas are in the CPU library.
        base = status("cpu")
        if not base.available:
            return Status(False, reason=f"the CPU library is missing: {base.reason}")
    try:
        path, built = _find(device)
    except (BuildError, OSError) as error:
        return Status(False, reason=str(error))
    try:
        torch.ops.load_library(str(path))
        detail = _detail(path) if device == "cpu" else None
        if device == "cpu":
            _register_fakes()
    except Exception as error:
        warnings.warn(f"mixkv: {path} cannot be loaded, plain torch is used instead: {error}", stacklevel=2)
        return Status(False, path, built, f"cannot be loaded: {error}")
    return Status(True, path, built, detail=detail)


def _find(device: str) -> tuple[Path, str]:
    """The library's path and how it came about; builds it where there is none."""
    folder = Path(__file__).resolve().parent / "_native"
    prebuilt = sorted(folder.glob(f"{_DEVICES[device]}-*.so"))
    if source_dir() is None:
        if prebuilt:
            return prebuilt[-1], "prebuilt"
        raise BuildError("the package came without a library and without its sources")
    name = f"{_DEVICES[device]}-{_source_hash(device)}.so"
    if (folder / name).is_file() and not _extra_flags():
        return folder / name, "prebuilt"
    command = compiler(device)
    if command is None:
        missing = "C++ compiler (c++, g++, clang++ or CXX)" if device == "cpu" else "nvcc"
        reason = f"no prebuilt library, and no {missing} to build one"
        warnings.warn(f"mixkv: {reason}; plain torch is used instead, which is slower", stacklevel=2)
        raise BuildError(reason)
    cache = Path(os.environ.get("MIXKV_CACHE") or Path.home() / ".cache" / "mixkv") / _cache_key(device, command)
    path, failure = cache / name, cache / f"{_DEVICES[device]}.failed.txt"
    if path.is_file():
        return path, "cached"
    cache.mkdir(parents=True, exist_ok=True)
    limit = _timeout(device)
    with _exclusively(cache / f"{_DEVICES[device]}.lock", limit):
        if path.is_file():
            return path, "cached"
        if failure.is_file():
            raise BuildError(f"an earlier build failed; its log is {failure}, delete it to try again")
        print(f"mixkv: building compiled operations for {device} into {cache}, once", file=sys.stderr, flush=True)
        try:
            _compile(device, path, limit)
        except BuildError as error:
            failure.write_text(f"{error}\n")
            warnings.warn(f"mixkv: the build failed, plain torch is used instead; see {failure}", stacklevel=2)
            raise
    return path, "now"


def _compile(device: str, target: Path, limit: float) -> None:
    """Compiles the sources and moves the library to its place in one step."""
    command, sources = compiler(device), source_dir()
    if command is None:
        raise BuildError(f"no {'C++ compiler' if device == 'cpu' else 'nvcc'} found")
    if sources is None:
        raise BuildError("the sources (csrc/) are missing")
    include, libraries = _torch_folders()
    units = _units(device, sources)
    if not units:
        raise BuildError(f"there are no sources for {device}")
    common = [_TARGET_FLAG, "-isystem", str(include)]
    deadline = time.monotonic() + limit
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as work:
        jobs = []
        for number, (source, flags) in enumerate(units):
            item = str(Path(work) / f"{number}.o")
            jobs.append((item, [command, *flags, *common, "-c", str(source), "-o", item]))
        with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
            for _ in pool.map(lambda job: _run(job[1], deadline), jobs):
                pass
        made = str(Path(work) / target.name)
        objects = [item for item, _ in jobs]
        torch_libraries = [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
        if device == "cuda":
            link = ["-cudart", "static", "-Xlinker", "--no-as-needed"]
        else:
            link = [*_extra_flags(), *([] if sys.platform == "darwin" else ["-Wl,--no-as-needed"])]
        _run([command, "-shared", *objects, "-o", made, *link, *torch_libraries], deadline)
        os.replace(made, target)


def _units(device: str, sources: Path) -> list[tuple[Path, list[str]]]:
    """Source files and the flags each is compiled with."""
    if device == "cuda":
        codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in _ARCHITECTURES]
        newest = _ARCHITECTURES[-1]
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        return [
            (path, [*_NVCC_FLAGS, *codes]) for path in sorted((sources / "cuda").glob("*.c*")) if path.suffix in (".cu", ".cpp")
        ]
    files = [sources / "registration.cpp", *sorted((sources / "cpu").glob("*.cpp"))]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        files = [path for path in files if path.name not in _TABLES]
    return [(path, [*_CXX_FLAGS, *_TABLES.get(path.name, []), *_extra_flags()]) for path in files]


def _extra_flags() -> list[str]:
    return os.environ.get("MIXKV_CXXFLAGS", "").split()


def _run(command: list[str], deadline: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        raise BuildError("the build took too long (MIXKV_BUILD_TIMEOUT sets the seconds it may take)") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{(done.stderr or done.stdout)[-4000:]}")


@contextlib.contextmanager
def _exclusively(path: Path, limit: float) -> Iterator[None]:
    """Holds a lock file against other processes. The system drops the lock when its holder ends, however it ends."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        deadline = time.monotonic() + limit
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has been building for {limit:.0f} s (lock: {path})") from None
                time.sleep(0.1)
            except OSError:
                # A file system without locks: a library is moved to its place in one step, so building twice does no harm.
                break
        yield


def _torch_folders() -> tuple[Path, Path]:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed: its headers are needed")
    root = Path(next(iter(spec.submodule_search_locations)))
    if not (root / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise BuildError(f"the torch in {root} has no stable ABI headers; {_TARGET[0]}.{_TARGET[1]} or newer is needed")
    return root / "include", root / "lib"


def _timeout(device: str) -> float:
    return float(os.environ.get("MIXKV_BUILD_TIMEOUT") or _TIMEOUT[device])


@functools.cache
def _source_hash(device: str) -> str:
    sources = source_dir()
    if sources is None:
        raise BuildError("the sources (csrc/) are missing")
    digest = hashlib.sha256()
    for path in sorted([*sources.glob("*"), *(sources / device).glob("*")]):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            digest.update(f"{path.relative_to(sources)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _cache_key(device: str, command: str) -> str:
    """Names what a library depends on besides its sources."""
    try:
        shown = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    flags = [*_CXX_FLAGS, *_NVCC_FLAGS, *_ARCHITECTURES, *_extra_flags(), _TARGET_FLAG]
    parts = [_source_hash(device), command, shown, *flags, *(flag for table in _TABLES.values() for flag in table)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return f"{sys.platform}-{platform.machine()}-torch{_TARGET[0]}.{_TARGET[1]}-{digest}"


def _detail(path: Path) -> str:
    name = ctypes.CDLL(str(path)).mixkv_cpu_kernels
    name.restype = ctypes.c_char_p
    return name().decode()


def _torch():
    import torch

    return torch


@functools.cache
def _dtypes() -> tuple:
    torch = _torch()
    return torch.float32, torch.float16, torch.bfloat16


@functools.cache
def _ops():
    if not status("cpu").available:
        raise RuntimeError(f"the compiled operations are not available: {status('cpu').reason}")
    return _torch().ops.mixkv


def _sinks(sinks: torch.Tensor | None) -> torch.Tensor | None:
    return None if sinks is None else sinks.detach().float().contiguous()


def _register_fakes() -> None:
    """Shapes and dtypes of the results, for tracing."""
    torch = _torch()

    def decode(query, value_buffer):
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value_buffer.shape[1])

    def nothing(*args):
        return None

    fakes = {
        "append": nothing,
        "compact": nothing,
        "move_rows": nothing,
        "attend": lambda query, key_buffer, value_buffer, *rest: decode(query, value_buffer),
        "append_attend": lambda query, key_buffer, value_buffer, *rest: decode(query, value_buffer),
        "attend_extend": lambda query, key_buffer, value_buffer, *rest: decode(query, value_buffer),
        "chunk_scores": lambda query, codes, grid, starts, counts, longest: query.new_empty(
            starts.numel(), longest, dtype=torch.float32
        ),
        "attend_chunks": lambda query, key_buffer, value_buffer, *rest: decode(query, value_buffer),
        "fetch_chunks": nothing,
        "window_scores": lambda query, key, *rest: key.new_empty(
            key.shape[0], key.shape[1], key.shape[2] - query.shape[2], dtype=torch.float32
        ),
        "projected_norm": lambda value, factor: value.new_empty(value.shape[:3], dtype=torch.float32),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"mixkv::{name}", fake)


def _main(arguments: list[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m mixkv.native", description="Builds the compiled operations ahead of time.")
    parser.add_argument("command", choices=["build"])
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent / "_native"))
    parser.add_argument("--cuda", action="store_true")
    given = parser.parse_args(arguments)
    print(build(given.out, given.cuda))


if __name__ == "__main__":
    _main(sys.argv[1:])
