"""The trial of back ends: what passes is used, what fails, crashes, hangs or lies is not, and the outcome is kept."""

import json
import sys
import textwrap

import pytest
import torch
from support.stores import needs_library

from mixkv.ops import build, checked, dispatch, reference, self_check, trial

CPU = torch.device("cpu")
PLACE = checked.Place(CPU, torch.float32, 32, 32)
SHAPES = ((1, 2, 2, 40), (2, 1, 3, 90))

# What a process under trial writes and does, after a line that is no event.
STARTED = """
    import json, os, sys, time
    def say(event, **what): print(json.dumps({"event": event, **what}), flush=True)
    print("a library says hello", flush=True)
    say("started")
"""
CHECKED = STARTED + '    say("checked", count=7, failures=[])\n    say("timing")\n'
BEHAVIOURS = {
    "fast": CHECKED + '    time.sleep(0.02)\n    say("timed", seconds=1e-5, steps=64, elapsed=0.02, failures=[])\n',
    "slow": CHECKED + '    time.sleep(0.02)\n    say("timed", seconds=2e-4, steps=64, elapsed=0.02, failures=[])\n',
    "wrong": STARTED + '    say("checked", count=7, failures=["attend 64/64: error 0.3", "append"])\n',
    "wrong when timed": CHECKED + '    say("timed", seconds=1e-5, steps=64, elapsed=0.02, failures=["other results"])\n',
    "crash": STARTED + "    os.abort()\n",
    "crash when timed": CHECKED + "    os.abort()\n",
    "error": STARTED + '    raise RuntimeError("an illegal memory access was encountered")\n',
    "silent end": CHECKED,
    "hang": STARTED + "    time.sleep(100)\n",
    "hang when timed": CHECKED + "    time.sleep(100)\n",
    "lie": CHECKED + '    time.sleep(1)\n    say("timed", seconds=1e-6, steps=64, elapsed=0.001, failures=[])\n',
    "lie about a step": CHECKED + '    say("timed", seconds=1.0, steps=64, elapsed=0.02, failures=[])\n',
    "unavailable": STARTED + '    say("unavailable", reason="it needs half precision")\n',
    "no start": 'import sys\nsys.exit("CUDA out of memory")\n',
}
EXPECTED = {
    "fast": ("passed", None),
    "slow": ("passed", None),
    "wrong": ("failed", "attend 64/64: error 0.3, and 1 more"),
    "wrong when timed": ("failed", "other results"),
    "crash": ("failed", "signal SIGABRT while being checked"),
    "crash when timed": ("failed", "signal SIGABRT while being timed"),
    "error": ("failed", "exit status 1 while being checked: RuntimeError: an illegal memory access was encountered"),
    "silent end": ("failed", "it ended while being timed"),
    "hang": ("failed", "did not end within 3 s while being checked"),
    "hang when timed": ("failed", "did not end within 3 s while being timed"),
    "lie": ("failed", "it said that its timing took 0.00 s, and it took 1."),
    "lie about a step": ("failed", "it said that its timing took 0.02 s"),
    "unavailable": ("unavailable", "it needs half precision"),
    "no start": ("not checked", "CUDA out of memory"),
}


@pytest.fixture
def behave(monkeypatch, tmp_path):
    """Has each candidate behave as it is named, in a cache folder of its own; returns the candidates that were tried."""
    monkeypatch.setenv("MIXKV_CACHE", str(tmp_path))
    monkeypatch.setattr(checked, "_chosen", {})
    monkeypatch.setattr(checked, "LIMIT", 3.0)
    tried = []

    def command(name, place):
        tried.append(name)
        return [sys.executable, "-c", textwrap.dedent(BEHAVIOURS[name])]

    def candidates(*names):
        monkeypatch.setattr(checked, "CANDIDATES", names)
        return tried

    monkeypatch.setattr(checked, "_command", command)
    return candidates


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_an_outcome_follows_from_what_a_process_does(behave, name):
    behave(name)
    result, reason = EXPECTED[name]
    outcome = checked.trial(name, PLACE, limit=3.0)
    assert outcome.result == result
    assert (outcome.reason is None) if reason is None else (reason in outcome.reason)
    assert (outcome.microseconds is not None) == (result == "passed")


def test_the_fastest_that_passed_is_used_and_kept(behave):
    tried = behave("wrong", "crash", "slow", "fast")
    with pytest.warns(UserWarning, match="back end crash failed its check and is not used: it ended with signal SIGABRT"):
        assert checked.choice(PLACE) == "fast"
    assert tried == ["wrong", "crash", "slow", "fast"]
    assert checked.choice(PLACE) == "fast" and len(tried) == 4
    checked._chosen.clear()
    assert checked.choice(PLACE) == "fast" and len(tried) == 4
    lines = checked.report(PLACE)
    assert "back end fast for float32 32/32" in lines[0] and str(checked.path()) in lines[0]
    assert "cuda: fast passed, 10 us a step" in lines
    assert any("wrong failed: attend 64/64" in line for line in lines)
    # Another store is another trial, and a damaged file is none.
    assert checked.known(PLACE._replace(dtype=torch.float16)) is None
    checked.path().write_text("{")
    checked._chosen.clear()
    with pytest.warns(UserWarning, match="not used"):
        assert checked.choice(PLACE) == "fast" and len(tried) == 8
    assert len(json.loads(checked.path().read_text())) == 1


def test_plain_torch_runs_where_nothing_passed_or_could_be_checked(behave):
    tried = behave("no start", "wrong")
    with pytest.warns(UserWarning, match="attend 64/64"):
        assert checked.choice(PLACE) == "torch"
    # What could not be checked is tried again by another process.
    assert checked.known(PLACE) is None and "have not been checked yet" in checked.report(PLACE)[0]
    checked._chosen.clear()
    with pytest.warns(UserWarning, match="attend 64/64"):
        checked.choice(PLACE)
    assert len(tried) == 4


def test_a_process_that_cannot_be_made_is_no_failure(behave, monkeypatch):
    behave("fast")
    monkeypatch.setattr(checked, "_command", lambda name, place: ["/nowhere/python"])
    assert checked.trial("fast", PLACE).result == "not checked"


def test_without_a_library_there_is_no_trial(behave, monkeypatch):
    tried = behave("native")

    def find(device):
        raise build.BuildError("no nvcc to build one")

    monkeypatch.setattr(build, "find", find)
    assert checked.trial("native", PLACE) == checked.Outcome("unavailable", "no nvcc to build one") and not tried


def test_a_gpu_gets_what_was_found(monkeypatch):
    cuda = torch.device("cuda")
    asked = []
    monkeypatch.delenv("MIXKV_BACKEND", raising=False)
    monkeypatch.setattr(checked, "choice", lambda place: asked.append(place) or "varlen")
    assert dispatch.choose("auto", cuda, torch.bfloat16, 64, 64) == "varlen"
    assert asked == [checked.Place(cuda, torch.bfloat16, 64, 64)]
    # What has been found cannot be had after all; rows of codes; a back end that was asked for.
    assert dispatch.choose("auto", cuda, torch.float32, 64, 64) == "torch"
    assert dispatch.choose("auto", cuda, torch.bfloat16, 64, 64, codes=True) == "torch"
    monkeypatch.setenv("MIXKV_BACKEND", "torch")
    assert dispatch.choose("auto", cuda, torch.bfloat16, 64, 64) == "torch"
    assert len(asked) == 2


@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_library), "torch"])
def test_the_back_ends_of_a_cpu_pass(backend):
    checks = self_check.Checks(backend, CPU).run([torch.float32, torch.bfloat16], [(32, 48)], SHAPES)
    assert not checks.failures and checks.count > 40
    assert {key.split()[0] for key in checks.worst} == {"attend", "attend_extend", "append_attend", "step", "attend_chunks"}
    seconds, wrong = trial.Timing(backend, CPU, torch.float32, 32, 48, cases=((1, 2, 2, 3, 9),)).seconds()
    assert seconds > 0 and not wrong


def changed(name, function):
    """A back end of which one operation is ``function`` of the right result."""
    right = getattr(reference, name)
    return lambda *args, **kwargs: function(right(*args, **kwargs))


@pytest.mark.parametrize("loss", [1.001, torch.nan])
def test_a_back_end_that_is_wrong_is_found_out(monkeypatch, loss):
    monkeypatch.setitem(dispatch._ATTEND, "torch", changed("attend", lambda out: out * loss))
    failures = self_check.Checks("torch", CPU).run([torch.float32], [(32, 32)], SHAPES).failures
    assert {failure.split()[0] for failure in failures} == {"attend", "append_attend"} and "plain torch" in failures[0]


def test_a_back_end_that_stores_wrong_rows_is_found_out(monkeypatch):
    def append(backend, buffers, key, value, position, valid=None):
        reference.append(buffers, key, value, position, valid)
        buffers.position.add_(1)

    monkeypatch.setattr(dispatch, "append", append)
    failures = self_check.Checks("torch", CPU).run([torch.float32], [(32, 32)], SHAPES).failures
    assert failures and all(failure.startswith("append n") for failure in failures)


def test_a_back_end_that_repeats_its_results_when_timed_is_found_out(monkeypatch):
    held = {}
    lazy = changed("attend", lambda out: held.setdefault(out.shape, out))
    monkeypatch.setitem(dispatch._ATTEND, "varlen", lazy)
    timing = trial.Timing("varlen", CPU, torch.float32, 32, 32, cases=((1, 2, 2, 3, 9),))
    assert "other results than plain torch" in timing.seconds()[1][0]


@needs_library
def test_a_trial_in_a_process_of_its_own(monkeypatch):
    small = "from mixkv.ops import trial; trial.SIZES = (); trial.TIMED = ((1, 2, 2, 3, 9),); trial.main()"
    command = checked._command
    monkeypatch.setattr(checked, "_command", lambda *args: [sys.executable, "-c", small, *command(*args)[3:]])
    outcome = checked.trial("native", PLACE)
    assert outcome.result == "passed", outcome
    assert outcome.checks > 20 and outcome.microseconds > 0
