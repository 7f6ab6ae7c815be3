"""The description of the machine, and peak memory."""

import sys

import pytest
import torch

from mixkv.evaluation import machine, memory


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell a process's peak")
def test_peak_memory_of_a_piece_of_work():
    cpu, size, slack = torch.device("cpu"), 2**26, 2**24
    for count in (0, size):
        before = memory.start(cpu)
        torch.ones(count, dtype=torch.uint8)
        assert max(0, count - slack) <= memory.peak(cpu, before) < count + slack
    assert memory.peak(cpu, None) is None


def test_a_shared_machine_is_noticed(monkeypatch):
    monkeypatch.setattr(machine, "_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert machine.crowded(None) is None and machine.crowded(0.1) is None
    assert "1.5 of the 4 cores" in machine.crowded(1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine.crowded(1.5) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert machine.crowded(4.0) is None


def test_others_are_not_this_process():
    others = machine.Others()
    others.busy = None
    assert others.cores() is None
    others.busy, others.own, others.began = machine._busy_seconds(), 0.0, 0.0
    assert others.cores() in (None, 0.0)
