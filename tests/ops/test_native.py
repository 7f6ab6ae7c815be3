"""The compiled operations against their twins in plain torch and against loops in float64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.stores import (
    DTYPES,
    UNEVEN,
    assert_close,
    assert_same_buffers,
    clean,
    coded,
    copied,
    make_store,
    needs_library,
    oracle_attend,
    oracle_extend,
    packed_of,
    rows_of,
    softmax_row,
    strided,
)

from mixkv.ops import native, native_scores, reference, score_reference
from mixkv.ops.arguments import LogitOptions


@needs_library
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("size", [16, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_equals_oracle(dtype, size, groups):
    torch.manual_seed(size + groups)
    store = make_store(UNEVEN, size, size, dtype)
    query = strided(2, 4 * groups, 1, size, dtype)
    scaling = size**-0.5
    result = native.attend(query, store, LogitOptions(scaling), max_length=700)
    twin = reference.attend(query, clean(store), LogitOptions(scaling), max_length=700, stride=None)
    exact = oracle_attend(query, store, scaling)
    twin.view(2, 4, groups, size)[0, 0] = 0.0  # the twin has no answer for a sequence without rows
    assert result.dtype == dtype and result.shape == (2, 1, 4 * groups, size)
    assert_close(result, exact, twin)


@needs_library
@pytest.mark.parametrize("value_size", [32, 48, 144])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap,with_sinks", [(30.0, False), (None, True), (5.0, True)])
def test_attend_oracle_options(dtype, value_size, softcap, with_sinks):
    torch.manual_seed(0)
    store = make_store([5, 0, 200, 33], 96, value_size, dtype)
    query = torch.randn(2, 6, 1, 96).to(dtype) * 3
    sinks = torch.randn(6).to(dtype) if with_sinks else None
    result = native.attend(query, store, LogitOptions(0.2, softcap=softcap, sinks=sinks), max_length=200)
    exact = oracle_attend(query, store, 0.2, softcap, sinks)
    assert_close(result, exact, exact.to(dtype))


@needs_library
def test_attend_oracle_size_256_steps():
    for size in range(16, 257, 16):
        for dtype in DTYPES:
            store = make_store([9, 40], size, size, dtype)
            query = torch.randn(1, 6, 1, size).to(dtype)
            result = native.attend(query, store, LogitOptions(size**-0.5), max_length=40)
            exact = oracle_attend(query, store, size**-0.5)
            assert_close(result, exact, exact.to(dtype))


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("lengths", [[20000], [5000, 0, 1, 9000], [40, 30000, 2, 700, 0, 0]], ids=str)
def test_attend_splits_long_sequences(lengths, threads):
    torch.manual_seed(1)
    store = make_store(lengths, 64, 64, torch.float32)
    query = torch.randn(1, len(lengths) * 3, 1, 64) * 2
    sinks = torch.randn(len(lengths) * 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        result = native.attend(query, store, LogitOptions(0.125, sinks=sinks), max_length=max(lengths))
    finally:
        torch.set_num_threads(before)
    assert_close(result, oracle_attend(query, store, 0.125, None, sinks))


@needs_library
def test_attend_extreme_logits():
    store = make_store([300, 300], 64, 64, torch.float32)
    for factor in (1e-30, 1e4, 1e8):
        query = torch.randn(1, 4, 1, 64) * factor
        result = native.attend(query, store, LogitOptions(1.0), max_length=300)
        twin = reference.attend(query, clean(store), LogitOptions(1.0), max_length=300, stride=None)
        assert_close(result, oracle_attend(query, store, 1.0), twin)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("new", [1, 2, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_append_equals_twin(dtype, new, padded):
    torch.manual_seed(2)
    store = make_store([0, 1, 77, 4], 80, 48, dtype, spare=5)
    key, value = strided(2, 2, new, 80, dtype), strided(2, 2, new, 48, dtype)
    valid = torch.tensor([[i % 2 == 0 for i in range(new)], [i > 0 for i in range(new)]]) if padded else None
    expected = copied(store)
    reference.append(expected, key, value, 900, valid)
    native.append(store, key, value, 900, valid)
    assert_same_buffers(store, expected)


@needs_library
def test_append_takes_any_layout():
    for layout in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):
        store = make_store([3, 4, 5, 6], 64, 64, torch.float32)
        key, value = (layout(torch.randn(2, 2, 2, 64)) for _ in range(2))
        expected = copied(store)
        reference.append(expected, key, value, 7)
        native.append(store, key, value, 7)
        assert store.lengths.tolist() == [5, 6, 7, 8]
        assert_same_buffers(store, expected)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_attend_equals_both(dtype):
    torch.manual_seed(3)
    store = make_store([0, 1, 77, 4], 64, 64, dtype)
    other = copied(store)
    query, key, value = strided(2, 6, 1, 64, dtype), strided(2, 2, 1, 64, dtype), strided(2, 2, 1, 64, dtype)
    result = native.append_attend(query, store, key, value, 31, LogitOptions(0.1), max_length=78)
    native.append(other, key, value, 31)
    separate = native.attend(query, other, LogitOptions(0.1), max_length=78)
    assert torch.equal(result, separate)
    assert_same_buffers(store, other)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups,new", [(1, 40), (3, 7), (4, 2), (9, 5)])
@pytest.mark.parametrize("masked", ["causal", "row", "shared"])
def test_extend_equals_oracle(dtype, groups, new, masked):
    torch.manual_seed(4)
    store = make_store([0, 1, 150, 4], 80, 64, dtype)
    query = strided(2, 2 * groups, new, 80, dtype)
    key, value = strided(2, 2, new, 80, dtype), strided(2, 2, new, 64, dtype)
    mask = None
    if masked != "causal":
        mask = torch.rand(2 if masked == "row" else 1, 1, new, new) < 0.5
        mask |= torch.eye(new, dtype=torch.bool)
    sinks = torch.randn(2 * groups) if masked == "row" else None
    softcap = 20.0 if masked == "shared" else None
    options = {"scaling": 0.11, "softcap": softcap, "sinks": sinks}
    result = native.attend_extend(query, store, key, value, LogitOptions(**options), mask=mask, max_length=150)
    twin = reference.attend_extend(
        query, clean(store), key, value, LogitOptions(**options), mask=mask, max_length=150, stride=None
    )
    exact = oracle_extend(query, store, key, value, mask, **options)
    assert result.shape == twin.shape and result.dtype == dtype
    assert_close(result, exact, twin)


@needs_library
def test_extend_query_that_sees_nothing_is_zero():
    store = make_store([0, 0], 64, 64, torch.float32)
    query, key, value = torch.randn(1, 2, 3, 64), torch.randn(1, 2, 3, 64), torch.randn(1, 2, 3, 64)
    mask = torch.ones(3, 3, dtype=torch.bool).tril().view(1, 1, 3, 3) & torch.tensor([False, True, True])
    result = native.attend_extend(query, store, key, value, LogitOptions(0.1), mask=mask, max_length=0)
    assert result[0, 0].abs().max() == 0 and not result.isnan().any()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compact_and_move_rows(dtype):
    torch.manual_seed(5)
    kept = [[0, 5, 9], [], [9], [1, 2, 3, 4, 8]]
    key, value = strided(2, 2, 10, 64, dtype), strided(2, 2, 10, 80, dtype)
    store = make_store([len(part) for part in kept], 64, 80, dtype)
    for buffer in (store.key, store.value):
        buffer.fill_(float("nan"))
    store.position.fill_(-1)
    positions = torch.tensor(sum(kept, []), dtype=torch.int32)
    native.compact(store, key, value, positions)
    for index, part in enumerate(kept):
        head = divmod(index, 2)
        assert torch.equal(rows_of(store, "key", index), key[head][part])
        assert torch.equal(rows_of(store, "value", index), value[head][part])
        assert rows_of(store, "position", index).tolist() == part
    assert int((~store.key.isnan()).any(dim=1).sum()) == int((store.position >= 0).sum()) == positions.numel()

    order = [1, 0, 1]
    index = torch.tensor(order)
    old_starts, new_lengths = (part.view(2, 2)[index].flatten() for part in (store.starts, store.lengths))
    moved = make_store(new_lengths.tolist(), 64, 80, dtype, spare=7)
    for buffer in (moved.key, moved.value):
        buffer.fill_(float("nan"))
    native.move_rows(moved, store._replace(starts=old_starts), max_length=5)
    for row, old in enumerate(order):
        for head in range(2):
            for name in ("key", "value", "position"):
                assert torch.equal(rows_of(moved, name, row * 2 + head), rows_of(store, name, old * 2 + head))
    assert int((~moved.key.isnan()).any(dim=1).sum()) == int(new_lengths.sum())


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "groups,window,columns,size", [(1, 1, 2, 64), (3, 8, 77, 80), (4, 32, 300, 128), (2, 33, 90, 96), (7, 50, 50, 64)]
)
@pytest.mark.parametrize("statistic", ["mean", "rms"])
@pytest.mark.parametrize("reduce,softcap,with_sinks,padded", [("mean", None, False, True), ("max", 10.0, True, False)])
def test_window_equals_oracle(dtype, groups, window, columns, size, statistic, reduce, softcap, with_sinks, padded):
    torch.manual_seed(6)
    query, key = strided(2, 2 * groups, window, size, dtype), strided(2, 2, columns, size, dtype)
    sinks = torch.randn(2 * groups) if with_sinks else None
    valid = (torch.arange(columns) >= torch.tensor([[0], [columns // 3]]).clamp(max=columns - window)).view(2, 1, columns)
    valid = valid if padded else None
    logits, options = LogitOptions(size**-0.5, softcap, sinks), {"statistic": statistic, "group_reduce": reduce}
    result = native_scores.window_attention(query, key, valid, logits, **options)
    twin = score_reference.window_attention(query, key, valid, logits, **options)
    exact = scores_in_double(query, key, valid, **vars(logits), **options)
    assert result.shape == twin.shape and result.dtype == torch.float32
    if result.numel():
        assert_close(result, exact, twin)


def scores_in_double(query, key, valid, scaling, statistic, group_reduce, softcap, sinks):
    batch, query_heads, window, _ = query.shape
    heads, columns = key.shape[1:3]
    groups = query_heads // heads
    out = torch.zeros(batch, heads, groups, columns - window, dtype=torch.float64)
    for b, q, w in itertools.product(range(batch), range(query_heads), range(window)):
        logits = key[b, q // groups].double() @ query[b, q, w].double() * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        seen = torch.arange(columns) <= columns - window + w
        if valid is not None:
            seen &= valid.expand(batch, heads, columns)[b, q // groups]
        logits[~seen] = -torch.inf
        weights = softmax_row(logits, None if sinks is None else sinks[q])
        weights = weights[: columns - window]
        out[b, q // groups, q % groups] += (weights**2 if statistic == "rms" else weights) / window
    out = out.sqrt() if statistic == "rms" else out
    return out.amax(dim=2) if group_reduce == "max" else out.mean(dim=2)


def projected_norm(value, factor):
    """The norms that compiled `importance` weighs tokens by, where all get the same attention."""
    batch, heads, rows, size = value.shape
    value = torch.cat([value, value.new_zeros(batch, heads, 1, size)], dim=2)
    query, key, options = value.new_zeros(batch, heads, 1, 16), value.new_zeros(batch, heads, rows + 1, 16), LogitOptions(1.0)
    found = native_scores.importance(query, key, None, options, kernel_size=1, pooling="max", value=value, factor=factor)
    return found * (rows + 1)


@needs_library
def test_window_padding_query_counts_as_nothing():
    query, key = torch.randn(1, 2, 4, 64), torch.randn(1, 2, 6, 64)
    valid = torch.tensor([[[False, False, False, True, True, True]]])
    result = native_scores.window_attention(query, key, valid, LogitOptions(0.1))
    assert torch.equal(result, torch.zeros(1, 2, 2))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows,size,outputs", [(1, 64, 64), (33, 80, 80), (300, 128, 128), (1030, 16, 5), (70, 256, 300), (0, 64, 64)]
)
@pytest.mark.parametrize("triangular", [False, True])
def test_projected_norm_equals_oracle(dtype, rows, size, outputs, triangular):
    torch.manual_seed(8)
    value, factor = strided(2, 3, rows, size, dtype), torch.randn(3, outputs, size)
    factor = factor.triu() if triangular else factor
    exact = (value.double() @ factor.double().transpose(-1, -2)).norm(dim=-1)
    result = projected_norm(value, factor)
    assert result.shape == (2, 3, rows) and result.dtype == torch.float32
    # bfloat16 values meet a factor rounded to bfloat16 where the chip multiplies those. What cancels leaves its error behind.
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-6
    scale = value.double().norm(dim=-1) * factor.double().flatten(1).norm(dim=-1).unsqueeze(-1)
    assert ((result - exact).abs() <= tolerance * scale).all()
    torch.testing.assert_close(score_reference.projected_norm(value, factor).double(), exact, rtol=1e-5, atol=1e-6)


@needs_library
@pytest.mark.parametrize(
    "value, factor",
    [
        (torch.zeros(1, 2, 5, 64), torch.zeros(3, 64, 64)),
        (torch.zeros(1, 2, 5, 64), torch.zeros(2, 64, 48)),
        (torch.zeros(1, 2, 5, 64), torch.zeros(2, 64, 64).double()),
        (torch.zeros(1, 2, 5, 24), torch.zeros(2, 24, 24)),
    ],
)
def test_wrong_projections_are_refused(value, factor):
    with pytest.raises(RuntimeError):
        projected_norm(value, factor)


def samples():
    """Arguments of every operation, for opcheck."""
    torch.manual_seed(7)
    for dtype, codes in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        store = make_store([2, 1, 7, 4], 64, 80, dtype, poison=False)
        store = coded(store) if codes else store
        query, key, value = (
            torch.randn(2, 6, 1, 64).to(dtype),
            torch.randn(2, 2, 1, 64).to(dtype),
            torch.randn(2, 2, 1, 80).to(dtype),
        )
        logits = (8, 0.1, 0.0, None)
        scales = (store.key_scale, store.value_scale)
        read = (store.key, store.value, store.starts, store.lengths, *scales)
        yield "append", (*store, key, value, 3)
        yield "append", (*store, key, value, 3, torch.ones(2, 1, dtype=torch.bool))
        others = packed_of([3, 0, 1, 9], 64, 80).buffers if codes else (None,) * 7
        others = (*others[:2], *others[3:])
        yield "attend", (query, *read, *others, *logits)
        yield "append_attend", (query, *store, *others, key, value, 3, codes, *logits)
        yield "attend_extend", (query, *read, *others, key, value, None, *logits)
        offsets = (store.lengths.cumsum(0) - store.lengths).to(torch.int32)
        positions = torch.zeros(int(store.lengths.sum()), dtype=torch.int32)
        yield "compact", (*store, offsets, key, value, positions)
        yield "move_rows", (*store, *copied(store).rows[:3], store.starts, *copied(store)[5:], 7)
        yield (
            "window_scores",
            (
                torch.randn(1, 4, 3, 64).to(dtype),
                torch.randn(1, 2, 9, 64).to(dtype),
                None,
                0.1,
                True,
                True,
                0.0,
                torch.randn(4),
            ),
        )
        counts = torch.tensor([[1] * key.shape[1]] * key.shape[0])
        positions = torch.zeros(counts.numel(), dtype=torch.int32)
        yield "gather", (key, key, positions, counts, True, True, codes, 16, 0.125)


@needs_library
def test_opcheck():
    for name, arguments in samples():
        torch.library.opcheck(getattr(torch.ops.mixkv, name).default, arguments)


@needs_library
@pytest.mark.parametrize(
    "change",
    [
        {"starts": lambda starts: starts.long()},
        {"lengths": lambda lengths: lengths + 1000},
        {"starts": lambda starts: starts - 1000},
        {"value": lambda value: value.half()},
        {"query": lambda query: query.double()},
        {"query": lambda query: query[..., :32]},
        {"query": lambda query: torch.randn(2, 3, 1, 64)},
        {"sinks": lambda sinks: torch.zeros(5)},
    ],
)
def test_wrong_arguments_are_refused(change):
    store = make_store([2, 1, 7, 4], 64, 64, torch.float32)
    given = {"query": torch.randn(2, 6, 1, 64), "sinks": None}
    ((name, changed),) = change.items()
    if name in given:
        given[name] = changed(given[name])
    else:
        store = store._replace(**{name: changed(getattr(store, name))})
    with pytest.raises(RuntimeError):
        native.attend(given["query"], store, LogitOptions(0.1, sinks=given["sinks"]), max_length=7)


@needs_library
def test_append_without_room_is_refused_and_writes_nothing():
    store = make_store([4], 64, 64, torch.float32, spare=0)
    before = copied(store)
    with pytest.raises(RuntimeError, match="reaches beyond"):
        native.append(store, torch.randn(1, 1, 50, 64), torch.randn(1, 1, 50, 64), 0)
    assert_same_buffers(store, before)


@needs_library
def test_why_not():
    cpu = torch.device("cpu")
    assert native.why_not(cpu, torch.float32, 64, 128) is None
    assert "not torch.float64" in native.why_not(cpu, torch.float64, 64, 64)
    assert "multiples of 16" in native.why_not(cpu, torch.float32, 40, 64)
    assert "not for meta" in native.why_not(torch.device("meta"), torch.float32, 64, 64)


# Each instruction set has its own vector width: every operation, group size and kind of tail once.
SAMPLE = "(attend_equals and (112 or 80)) or options or 256_steps or extreme or (extend_equals and row) or window_equals or projected_norm or diversity"
SAMPLE += " or (row_codes and (append_equals or gather or extend_equals))"


INSTRUCTIONS = ["baseline", "avx2", "avx512"]


@pytest.fixture(scope="module")
def other_runs():
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in ("test_native_selection.py", "test_row_codes.py"))]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x", "-p", "no:cacheprovider", "-k", SAMPLE]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return {name: subprocess.Popen(command, env={**os.environ, "MIXKV_CPU": name}, **pipes) for name in INSTRUCTIONS}


@needs_library
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_other_instruction_sets(instructions, other_runs):
    output, _ = other_runs[instructions].communicate(timeout=300)
    assert other_runs[instructions].returncode == 0, output[-3000:]
