"""benchmarks/peers.py: its protocol and its arithmetic, with mixkv's own worker on a tiny model."""

import importlib.util
import sys
from pathlib import Path

import pytest
from support.text_models import make_model

pytest.importorskip("rich")


@pytest.fixture(scope="module")
def peers():
    path = Path(__file__).parents[2] / "benchmarks" / "peers.py"
    spec = importlib.util.spec_from_file_location("peers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_worker_reads_answers_and_steps(peers, tmp_path, capsys):
    make_model().save_pretrained(tmp_path)
    worker = peers.Worker("mixkv", Path(sys.executable), str(tmp_path), rows=40, window=8, threads=1)
    try:
        records = peers.compare([worker], [index * 7 % 60 for index in range(200)], 2, 5, lambda what, total: None)
    finally:
        worker.close()
    by_name = {record["cache"]: record for record in records}
    assert set(by_name) == {"full", *(f"{m} {s}" for m in ("snapkv", "pyramidkv", "adakv") for s in ("attn", "mix"))}
    full = by_name.pop("full")
    assert full["rows_per_head"] == 200 and full["bytes"] == 2 * 2 * 200 * 2 * 16 * 4
    assert full["bytes_to_full"] == full["prefill_to_full"] == full["step_to_full"] == 1 and full["mean_kl"] == 0
    for record in by_name.values():
        assert record["rows_per_head"] == pytest.approx(40) and record["bytes_to_full"] < 0.5
        assert record["mean_kl"] > 1e-6 and record["prefill_seconds"] > 0 and record["step_seconds"] > 0
    peers.show(peers.tables.Console(), records)
    assert "pyramidkv mix" in capsys.readouterr().out


def test_a_worker_that_fails_is_named(peers, tmp_path):
    with pytest.raises(RuntimeError, match="worker for mixkv ended with code 1"):
        peers.Worker("mixkv", Path(sys.executable), str(tmp_path), rows=40, window=8, threads=1)
