"""`mixkv build`."""

from mixkv import cli
from mixkv.ops import build


def test_it_compiles_now_and_prints_where(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build, "find", lambda device, again: (tmp_path / device, "now" if again else "cached"))
    assert cli.main(["build", "--device", "cpu"]) == 0
    assert f"cpu: {tmp_path / 'cpu'} (built in 0 s)" in capsys.readouterr().out


def test_cuda_is_included_where_there_is_nvcc(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(build, "find", lambda device, again: asked.append(device) or (tmp_path, "cached"))
    for compiler in ("/usr/bin/nvcc", None):
        monkeypatch.setattr(build, "compiler", lambda device, compiler=compiler: compiler)
        assert cli.main(["build"]) == 0
    assert asked == ["cpu", "cuda", "cpu"] and "(cached)" in capsys.readouterr().out


def test_without_a_compiler_the_reason_is_named(monkeypatch, capsys):
    def no_compiler(device, again):
        raise build.BuildError("no C++ compiler")

    monkeypatch.setattr(build, "find", no_compiler)
    assert cli.main(["build", "--device", "cpu"]) == 2
    assert "mixkv build: error: the operations for cpu cannot be compiled: no C++ compiler" in capsys.readouterr().err
