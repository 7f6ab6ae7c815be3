"""Builds the compiled operations of ``csrc/`` into a library, and finds the library that fits this machine.

Two libraries hold the same operations, ``libmixkv`` for the CPU and ``libmixkv_cuda`` for NVIDIA GPUs. Each is taken from the
package (built by setup.py) or from a cache folder, else built into that folder. They are written against torch's stable ABI:
one build serves every Python and every torch from 2.10 on. This file imports neither torch nor the package: setup.py runs it.

Environment: ``MIXKV_CACHE`` is the cache folder (see `cache_folder`); ``CXX``, ``NVCC`` the compilers,
``MIXKV_CXXFLAGS`` further flags; ``MIXKV_BUILD_TIMEOUT`` the seconds that a build may take.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent

# The oldest torch whose ABI the libraries use, as `TORCH_TARGET_VERSION` wants it.
TARGET = (2, 10)
_TARGET_FLAG = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Files that are compiled for one instruction set each; which one runs is decided when the library is loaded.
_TABLES = {
    "table_avx2.cpp": _AVX2,
    "table_avx512.cpp": _AVX512,
    "table_avx512_bf16.cpp": [*_AVX512, "-mavx512bf16", "-mavx512vnni"],
}
_NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
_ARCHITECTURES = ("80", "86", "89", "90", "100")
_TIMEOUT = {"cpu": 300, "cuda": 1200}
DEVICES = {"cpu": "libmixkv", "cuda": "libmixkv_cuda"}


class BuildError(RuntimeError):
    """A library could not be built; the message says why and what to do."""


def build(out_dir: str | os.PathLike, cuda: bool = False) -> Path:
    """Builds the CPU library, and the CUDA library where ``cuda``, into a folder.

    torch is not imported: its headers are enough.

    Returns: the path of the CPU library.

    Raises:
        BuildError: no compiler, no torch, or the compiler's own message.
    """
    for device in ("cpu", "cuda") if cuda else ("cpu",):
        target = Path(out_dir) / f"{DEVICES[device]}-{source_hash(device)}.so"
        _compile(device, target, _timeout(device))
    return Path(out_dir) / f"{DEVICES['cpu']}-{source_hash('cpu')}.so"


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
    return next((path for path in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if (path / "registration.cpp").is_file()), None)


def cache_folder() -> Path:
    """Where what is made once is kept: ``MIXKV_CACHE``, else ``XDG_CACHE_HOME/mixkv``, else ``~/.cache/mixkv``."""
    own = os.environ.get("MIXKV_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mixkv"


def find(device: str, *, again: bool = False) -> tuple[Path, str]:
    """The library for ``cpu`` or ``cuda``; builds it where there is none.

    Args:
        device: for which.
        again: builds although an earlier build failed.

    Returns: its path, and how it came about: ``prebuilt`` (came with the package), ``cached`` (built earlier) or ``now``.

    Raises:
        BuildError: there is none, and none can be built.
        OSError: the cache folder cannot be written.
    """
    folder = _PACKAGE / "_native"
    prebuilt = sorted(folder.glob(f"{DEVICES[device]}-*.so"))
    if source_dir() is None:
        if prebuilt:
            return prebuilt[-1], "prebuilt"
        raise BuildError("the package came without a library and without its sources")
    name = f"{DEVICES[device]}-{source_hash(device)}.so"
    if (folder / name).is_file() and not _extra_flags():
        return folder / name, "prebuilt"
    command = compiler(device)
    if command is None:
        missing = "C++ compiler (c++, g++, clang++ or CXX)" if device == "cpu" else "nvcc"
        reason = f"no prebuilt library, and no {missing} to build one"
        remedy = "plain torch is used instead, which is slower. Once it is installed, run: mixkv build"
        warnings.warn(f"mixkv: {reason}; {remedy}", stacklevel=2)
        raise BuildError(reason)
    cache = cache_folder() / _cache_key(device, command)
    path, failure = cache / name, cache / f"{DEVICES[device]}.failed.txt"
    if path.is_file():
        return path, "cached"
    cache.mkdir(parents=True, exist_ok=True)
    limit = _timeout(device)
    with exclusively(cache / f"{DEVICES[device]}.lock", limit):
        if path.is_file():
            return path, "cached"
        if failure.is_file() and not again:
            raise BuildError(f"an earlier build failed; its log is {failure}. To try again: mixkv build")
        print(
            f"mixkv: building compiled operations for {device} into {cache}, once (beforehand: mixkv build)",
            file=sys.stderr,
            flush=True,
        )
        try:
            _compile(device, path, limit)
            failure.unlink(missing_ok=True)
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
            running = [pool.submit(_run, command, deadline) for _, command in jobs]
            for done in _progress(as_completed(running), f"mixkv: {device}", len(jobs)):
                done.result()
        made = str(Path(work) / target.name)
        objects = [item for item, _ in jobs]
        torch_libraries = [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
        if device == "cuda":
            link = ["-cudart", "static", "-Xlinker", "--no-as-needed"]
        else:
            link = [*_extra_flags(), *([] if sys.platform == "darwin" else ["-Wl,--no-as-needed"])]
        _run([command, "-shared", *objects, "-o", made, *link, *torch_libraries], deadline)
        os.replace(made, target)


def _progress(items: Iterable[Future], name: str, total: int) -> Iterable[Future]:
    """``items`` behind a progress bar, where tqdm is installed (in pip's isolated builds it is not)."""
    if importlib.util.find_spec("tqdm") is None:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=name, total=total, unit="file")


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
def exclusively(path: Path, limit: float) -> Iterator[None]:
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
        raise BuildError(f"the torch in {root} has no stable ABI headers; {TARGET[0]}.{TARGET[1]} or newer is needed")
    return root / "include", root / "lib"


def _timeout(device: str) -> float:
    return float(os.environ.get("MIXKV_BUILD_TIMEOUT") or _TIMEOUT[device])


@functools.cache
def source_hash(device: str) -> str:
    """Names the sources of the operations for ``device``.

    Raises:
        BuildError: they are missing.
    """
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
    parts = [source_hash(device), command, shown, *flags, *(flag for table in _TABLES.values() for flag in table)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return f"{sys.platform}-{platform.machine()}-torch{TARGET[0]}.{TARGET[1]}-{digest}"


def _main(arguments: list[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m mixkv.ops.build", description="Builds the compiled operations ahead of time."
    )
    parser.add_argument("command", choices=["build"])
    parser.add_argument("--out", default=str(_PACKAGE / "_native"))
    parser.add_argument("--cuda", action="store_true")
    given = parser.parse_args(arguments)
    print(build(given.out, given.cuda))


if __name__ == "__main__":
    _main(sys.argv[1:])
