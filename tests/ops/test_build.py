"""Building and loading the compiled operations: without a compiler, after failures, several processes at once, sanitized."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mixkv.ops import build, native

slow = pytest.mark.skipif(not os.environ.get("MIXKV_SLOW_TESTS"), reason="minutes; set MIXKV_SLOW_TESTS=1")

OPERATIONS = Path(__file__).with_name("test_native.py")


def run_python(code, timeout=300, **environment):
    root = str(Path(native.__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_forced_torch_loads_nothing():
    done = run_python("from mixkv.ops import native; print(native.status())", MIXKV_BACKEND="torch")
    assert "available=False" in done.stdout and "MIXKV_BACKEND=torch" in done.stdout, done.stderr


def test_no_compiler_warns_once(tmp_path):
    code = """
    import shutil, warnings
    from pathlib import Path
    from mixkv.ops import build, native
    build.compiler = lambda device="cpu": None
    build._PACKAGE = Path(build.source_dir()).parent / "elsewhere"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        native.status(), native.status()
    assert not native.status().available
    print(len(seen), seen[0].message)
    import torch
    from mixkv.ops import dispatch
    dispatch.choose("auto", torch.device("cpu"), torch.float32, 64, 64)
    """
    done = run_python(code, MIXKV_CACHE=str(tmp_path), MIXKV_BACKEND="auto")
    assert done.returncode == 0 and done.stdout.startswith("1 ") and "no C++ compiler" in done.stdout, done.stderr
    assert "mixkv build" in done.stdout and len(done.stdout.splitlines()) == 1
    forced = run_python(code, MIXKV_CACHE=str(tmp_path), MIXKV_BACKEND="native")
    assert forced.returncode and "cannot be used: no prebuilt library" in forced.stderr


def test_unloadable_library_is_harmless(tmp_path):
    code = """
    from pathlib import Path
    from mixkv.ops import build, native
    broken = Path(r"%s") / "libmixkv-broken.so"
    broken.write_bytes(b"not a library")
    build.find = lambda device: (broken, "prebuilt")
    print(native.status())
    """
    done = run_python(code % tmp_path, MIXKV_BACKEND="auto")
    assert "available=False" in done.stdout and "cannot be loaded" in done.stdout, done.stderr


def test_failed_build_is_remembered(tmp_path):
    code = """
    from pathlib import Path
    from mixkv.ops import build, native
    build._PACKAGE = Path(build.source_dir()).parent / "elsewhere"
    print(native.status().reason[:60].replace("\\n", " "))
    """
    if build.compiler() is None:
        pytest.skip("no compiler")
    environment = {"MIXKV_CACHE": str(tmp_path), "MIXKV_CXXFLAGS": "-include nowhere.h", "MIXKV_BACKEND": "auto"}
    first, second = run_python(code, **environment), run_python(code, **environment)
    assert "building compiled operations" in first.stderr
    assert "an earlier build failed" in second.stdout, second.stderr
    assert "building" not in second.stderr


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"MIXKV_CACHE": "/own"}, "/own"),
        ({"MIXKV_CACHE": "~/own", "HOME": "/home/me"}, "/home/me/own"),
        ({"MIXKV_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/mixkv"),
        ({"MIXKV_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/mixkv"),
    ],
)
def test_libraries_are_kept_in_the_cache_folder(environment, expected, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert build.cache_folder() == Path(expected)
    monkeypatch.setattr(build, "_PACKAGE", build.source_dir().parent / "elsewhere")
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "_compile", lambda device, target, limit: target.write_bytes(b""))
    if build.compiler() is None:
        pytest.skip("no compiler")
    path, built = build.find("cpu")
    assert path.is_relative_to(tmp_path) and built == "now" and build.find("cpu") == (path, "cached")


def test_a_failed_build_is_tried_again_on_request(monkeypatch, tmp_path):
    if build.compiler() is None:
        pytest.skip("no compiler")
    monkeypatch.setenv("MIXKV_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_PACKAGE", build.source_dir().parent / "elsewhere")
    monkeypatch.setattr(build, "_compile", lambda *args: (_ for _ in ()).throw(build.BuildError("no room")))
    with pytest.warns(UserWarning, match="the build failed"), pytest.raises(build.BuildError, match="no room"):
        build.find("cpu")
    monkeypatch.setattr(build, "_compile", lambda device, target, limit: target.write_bytes(b""))
    with pytest.raises(build.BuildError, match="an earlier build failed.*mixkv build"):
        build.find("cpu")
    path, _ = build.find("cpu", again=True)
    assert build.find("cpu") == (path, "cached")


@slow
def test_concurrent_first_use_builds_once(tmp_path):
    code = """
    from pathlib import Path
    from mixkv.ops import build, native
    build._PACKAGE = Path(build.source_dir()).parent / "elsewhere"
    print(native.status())
    """
    if build.compiler() is None:
        pytest.skip("no compiler")
    environment = {**os.environ, "PYTHONPATH": str(Path(native.__file__).resolve().parents[2]), "MIXKV_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=400) for process in both]
    assert all("available=True" in out for out, _ in outputs)
    assert sum("building compiled operations" in err for _, err in outputs) == 1


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for libasan with gcc")
def test_address_sanitizer_finds_nothing(tmp_path):
    compiler = build.compiler()
    if compiler is None:
        pytest.skip("no compiler")
    # libstdc++ as well: the sanitizer looks for its exception functions at start.
    names = ("libasan.so", "libstdc++.so.6")
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip() for name in names
    ]
    if not all(Path(path).is_file() for path in found):
        pytest.skip("no libasan")
    environment = {
        **os.environ,
        "MIXKV_CACHE": str(tmp_path),
        "MIXKV_CXXFLAGS": "-fsanitize=address -fno-omit-frame-pointer -O1",
        "MIXKV_BACKEND": "auto",
    }
    built = run_python("from mixkv.ops import build; print(build.find('cpu'))", **environment)
    assert "now" in built.stdout, built.stderr
    environment |= {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1"}
    for instructions in ("avx2", ""):
        command = [sys.executable, "-m", "pytest", str(OPERATIONS), "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-s", "-k", "oracle or extreme or splits or append or compact or extend or window or norm or refused"]
        done = subprocess.run(
            command, env={**environment, "MIXKV_CPU": instructions}, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@slow
def test_ahead_of_time_build_imports_no_torch(tmp_path):
    """As setup.py does it: build.py on its own. Without a GPU the CUDA library must still load, under its dispatch key."""
    if build.compiler() is None:
        pytest.skip("no compiler")
    cuda = build.compiler("cuda") is not None and any((build.source_dir() / "cuda").glob("*.cu"))
    code = """
    import importlib.util, sys
    spec = importlib.util.spec_from_file_location("ahead", r"%s")
    module = sys.modules["ahead"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build(r"%s", cuda=%r)
    assert "torch" not in sys.modules
    import torch
    from pathlib import Path
    for path in sorted(Path(r"%s").glob("*.so"), key=lambda path: "cuda" in path.name):
        torch.ops.load_library(str(path))
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    print([has("mixkv::append_attend", key) for key in ("CPU", "CUDA")])
    """
    done = run_python(code % (build.__file__, tmp_path, cuda, tmp_path), timeout=1500)
    assert done.stdout.strip() == f"[True, {cuda}]", done.stderr
