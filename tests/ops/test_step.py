"""A decode step by counts on the device: the compiled operation and the plain one against appending, and a loop in float64."""

import pytest
import torch
from support.stores import (
    DTYPES,
    assert_close,
    assert_same_buffers,
    clean,
    copied,
    make_store,
    needs_library,
    oracle_attend,
    strided,
)

from mixkv.ops import reference
from mixkv.ops import step as decode_step
from mixkv.ops.arguments import FixedRoom, LogitOptions

LENGTHS = [0, 1, 200, 3, 129, 128, 17, 16]


def room_of(store, spare):
    evicted = torch.randint(0, 1000, (store.lengths.numel(),), dtype=torch.int32)
    return FixedRoom(store.starts + store.lengths + spare, evicted)


def new_rows(batch, heads, size, value_size, dtype):
    return strided(batch, heads, 1, size, dtype), strided(batch, heads, 1, value_size, dtype)


@needs_library
@pytest.mark.parametrize("size, value_size, groups", [(16, 16, 1), (64, 48, 3), (128, 128, 4), (80, 144, 7), (32, 32, 20)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_equals_append_and_attend(dtype, size, value_size, groups):
    torch.manual_seed(size + groups)
    decode_step.prepare()
    store = make_store(LENGTHS, size, value_size, dtype)
    room, query = room_of(store, 2), strided(2, 4 * groups, 1, size, dtype)
    sinks = torch.randn(4 * groups).to(dtype) if groups == 3 else None
    logits = LogitOptions(0.2, softcap=5.0 if groups == 7 else None, sinks=sinks)
    for _ in range(2):
        rows = new_rows(2, 4, size, value_size, dtype)
        before, plain, expected = copied(store), clean(copied(store)), copied(store)
        reference.append(expected, *rows, 0)
        ends = (before.starts + before.lengths).long()
        expected.position[ends] = before.lengths + room.evicted
        result = decode_step.step("native", query, store, room, *rows, logits, max_length=256)
        twin = decode_step.step("torch", query, plain, room, *rows, logits, max_length=256)
        assert_same_buffers(store, expected)
        assert_same_buffers(plain, clean(expected))
        exact = oracle_attend(query, store, 0.2, logits.softcap, sinks)
        assert result.shape == (2, 1, 4 * groups, value_size)
        assert_close(twin, exact, exact.to(dtype))
        assert_close(result, exact, twin)


@needs_library
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_step_without_room_touches_no_neighbour(backend):
    decode_step.prepare()
    store = clean(make_store([5, 9], 32, 32, torch.float32, spare=1))
    room, query = room_of(store, 1), torch.randn(1, 4, 1, 32)
    rows = new_rows(1, 2, 32, 32, torch.float32)
    decode_step.step(backend, query, store, room, *rows, LogitOptions(0.2), max_length=16)
    before = copied(store)
    with pytest.raises((RuntimeError, ValueError), match="sequence 0 .*no room"):
        decode_step.step(backend, query, store, room, *rows, LogitOptions(0.2), max_length=16)
    assert_same_buffers(store, before)


@needs_library
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_step_is_one_traceable_operation(backend):
    decode_step.prepare()
    store = clean(make_store(LENGTHS, 32, 16, torch.float32))
    room, rows, query = room_of(store, 2), new_rows(2, 4, 32, 16, torch.float32), torch.randn(2, 8, 1, 32)
    operation = torch.ops.mixkv.step.default if backend == "native" else torch.ops.mixkv_plain.step.default
    sinks = torch.randn(8)
    arguments = (query, *store, *room, *rows, 256, 0.2, 0.0, sinks)
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))
