"""A short run of benchmarks/endurance.py: a conversation stays within its bound, threads agree, nothing is kept alive."""

import gc
import importlib.util
import weakref
from pathlib import Path

import pytest

import mixkv


@pytest.fixture(scope="module")
def endurance():
    spec = importlib.util.spec_from_file_location("endurance", Path(__file__).parents[2] / "benchmarks" / "endurance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_conversation_holds_no_more_after_many_turns(endurance):
    held = []
    for cache in endurance.conversation(endurance.tiny(), 40):
        rows, spare = (cache.stats()[name] for name in ("rows", "spare_rows"))
        assert rows == 2 * 2 * (32 + 3) or len(held) < 5
        held.append(cache.stats()["bytes"])
    assert max(held[20:]) <= max(held[:20])


def test_generations_of_all_kinds_leave_no_cache_behind(endurance, monkeypatch):
    alive = []
    made = mixkv.MixKVCache.__init__

    def counted(self, *args, **kwargs):
        made(self, *args, **kwargs)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(mixkv.MixKVCache, "__init__", counted)
    for _ in endurance.generations(endurance.tiny(), 30):
        pass
    gc.collect()
    assert len(alive) >= 30 and sum(one() is not None for one in alive) <= 1


def test_threads_find_what_they_find_alone(endurance):
    endurance.in_threads(endurance.tiny(), 4, 2)
