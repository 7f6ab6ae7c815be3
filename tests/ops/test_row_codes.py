"""Rows in codes: they against their definition, and the compiled operations on codes against plain torch and float64."""

from __future__ import annotations

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
    decoded,
    make_store,
    needs_library,
    oracle_attend,
    oracle_extend,
    packed_of,
    query_rounding,
    strided,
)

from mixkv.ops import native, reference, row_access, selection_reference
from mixkv.ops.arguments import LogitOptions
from mixkv.ops.row_codes import LEVELS, dequantised, packed, quantised, rotated, rotated_back, unpacked


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1e-9, 1e-5, 1.0, 1e4])
def test_error_is_half_a_step(dtype, factor):
    torch.manual_seed(0)
    rows = (torch.randn(50, 64) * torch.rand(50, 1) * factor).to(dtype)
    codes, scale = quantised(rows)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float16 and scale.shape == (50,)
    exact = rows.double()
    # The scale is rounded: to 11 bits, and where it is subnormal to 2**-24.
    largest = exact.abs().amax(dim=-1)
    step = largest / 127 * (1 + 2**-11) + 2**-25
    error = (dequantised(codes, scale, torch.float64) - exact).abs().amax(dim=-1)
    assert (error <= step / 2 + largest * 2**-11 + 127 * 2**-25).all()


def test_zeros_and_huge_rows():
    codes, scale = quantised(torch.tensor([[0.0, 0.0], [1e30, -1e30]]))
    assert codes.tolist() == [[0, 0], [127, -127]] and scale[0] == 0 and scale.isfinite().all()


@pytest.mark.parametrize("size", [16, 48, 64, 80, 96, 128, 256])
def test_rotation_is_orthogonal_and_makes_rows_normal(size):
    torch.manual_seed(size)
    rows = torch.randn(5, 7, size, dtype=torch.float64)
    turned = rotated(rows)
    assert torch.allclose(rotated_back(turned), rows)
    assert torch.allclose(turned @ turned.mT, rows @ rows.mT)
    one = torch.zeros(size, dtype=torch.float64)
    one[3] = 1.0
    assert (rotated(one).abs().amax() - (size & -size) ** -0.5).abs() < 1e-12


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_packed_rows(dtype):
    torch.manual_seed(0)
    rows = (torch.randn(400, 64) * torch.rand(400, 1).mul(4).exp()).to(dtype)
    codes, scale = packed(rows)
    assert codes.dtype == torch.uint8 and codes.shape == (400, 32) and scale.dtype == torch.float16
    levels = unpacked(codes).float()
    assert torch.equal(levels[:, 5], torch.tensor(LEVELS)[codes[:, 5].int() & 15].float())
    assert torch.equal(levels[:, 37], torch.tensor(LEVELS)[codes[:, 5].int() >> 4].float())
    read = dequantised(codes, scale)
    # Every element has the level nearest to it, and normal elements have the least error that 16 levels can give (0.0095).
    steps = rows.float() / scale.float().unsqueeze(-1)
    distance = (steps.unsqueeze(-1) - torch.tensor(LEVELS)).abs()
    assert torch.allclose((steps - levels).abs(), distance.amin(dim=-1), atol=1e-3)
    error = ((read - rows.float()).square().sum(dim=-1) / rows.float().square().sum(dim=-1)).mean()
    assert 0.007 < error < 0.0105
    zeros = packed(torch.zeros(2, 32))
    assert (dequantised(*zeros) == 0).all()


@needs_library
@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("size, value_size", [(16, 32), (64, 64), (80, 112), (256, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_attend_equals_oracle(dtype, size, value_size, groups):
    torch.manual_seed(size + groups)
    store, others = coded(make_store([5, 0, 30, 1], size, value_size, dtype)), packed_of([0, 3, 300, 17], size, value_size)
    query, logits = strided(2, 2 * groups, 1, size, dtype), LogitOptions(size**-0.5)
    result = native.attend(query, store, logits, max_length=30, packed=others)
    cleaned = others._replace(buffers=clean(others.buffers))
    twin = reference.attend(query, clean(store), logits, max_length=30, stride=None, packed=cleaned)
    whole = decoded(store, others)
    exact = oracle_attend(query, whole, size**-0.5)
    assert_close(result, exact, twin, query_rounding(query, whole, size**-0.5))
    assert_close(twin, exact, exact.to(dtype))


@needs_library
@pytest.mark.parametrize("new", [1, 6])
def test_packed_extend_and_append_equal_oracle(new):
    torch.manual_seed(4)
    store, others = coded(make_store([0, 1, 150, 4], 80, 64, torch.float32, spare=8)), packed_of([7, 0, 140, 1], 80, 64)
    query, key, value = (
        strided(2, 6, new, 80, torch.float32),
        strided(2, 2, new, 80, torch.float32),
        strided(2, 2, new, 64, torch.float32),
    )
    logits, cleaned = LogitOptions(0.11), others._replace(buffers=clean(others.buffers))
    result = native.attend_extend(query, store, key, value, logits, mask=None, max_length=150, packed=others)
    options = {"mask": None, "max_length": 150, "stride": None, "packed": cleaned}
    twin = reference.attend_extend(query, clean(store), key, value, logits, **options)
    whole = decoded(store, others)
    exact = oracle_extend(query, whole, key, value, None, 0.11)
    assert_close(result, exact, twin, query_rounding(query, whole, 0.11))
    assert_close(twin, exact, exact.float())
    if new == 1:
        output = native.append_attend(query, store, key, value, 31, logits, max_length=151, packed=others)
        assert torch.equal(output, native.attend(query, store, logits, max_length=151, packed=others))


@needs_library
@pytest.mark.parametrize("size, value_size", [(16, 48), (48, 16), (64, 64), (80, 112), (112, 80), (128, 256), (256, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_rotated_equals_twin(dtype, size, value_size):
    torch.manual_seed(size)
    key, value = strided(2, 2, 90, size, dtype), strided(2, 2, 90, value_size, dtype)
    key = key * torch.rand(2, 2, 90, 1).mul(6).exp().to(dtype)
    key[0, 0, 3] = 0.0
    counts = torch.tensor([[40, 0], [90, 17]])
    positions = torch.cat([torch.randperm(90)[:n].sort().values for n in counts.flatten().tolist()]).to(torch.int32)
    sources = [
        torch.cat([part[i // 2, i % 2, taken.long()] for i, taken in enumerate(positions.split(counts.flatten().tolist()))])
        for part in (key, value)
    ]
    for pack in (False, True):
        options = {"codes": True, "rotate": True, "pack": pack}
        store = native.gather(key, value, positions, counts, **options)
        twin = selection_reference.gather(key, value, positions, counts, **options)
        for name in ("position", "starts", "lengths"):
            assert torch.equal(getattr(store, name), getattr(twin, name))
        rows = row_access.flat_rows(store.starts, store.lengths, 147)
        spare = torch.ones(store.key.shape[0], dtype=torch.bool).index_fill(0, rows, False)
        for name, source in zip(("key", "value"), sources):
            codes, twin_codes = getattr(store, name), getattr(twin, name)
            scale, twin_scale = getattr(store, f"{name}_scale"), getattr(twin, f"{name}_scale")
            assert codes.shape == twin_codes.shape and codes.dtype == twin_codes.dtype
            assert not codes[spare].any() and not scale[spare].any()
            # Sums are taken in another order: a scale may be the next float16, an element between two codes have the other one.
            assert torch.allclose(scale.float(), twin_scale.float(), rtol=2**-10)
            assert (codes != twin_codes).float().mean() < 0.002
            read, other = (
                rotated_back(dequantised(part[rows], of[rows])) for part, of in ((codes, scale), (twin_codes, twin_scale))
            )
            lost, twin_lost = ((part - source.float()).square().sum() for part in (read, other))
            assert abs(lost / twin_lost - 1) < 0.02 and lost < source.float().square().sum() * (0.015 if pack else 1e-4)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rotated_step_equals_twin(dtype):
    torch.manual_seed(8)
    store, others = coded(make_store([5, 0, 30, 1], 64, 80, dtype)), packed_of([0, 3, 300, 17], 64, 80)
    query, key, value = strided(2, 6, 1, 64, dtype), strided(2, 2, 1, 64, dtype), strided(2, 2, 1, 80, dtype)
    logits, cleaned = LogitOptions(0.125), others._replace(buffers=clean(others.buffers))
    before = copied(clean(store))
    result = native.append_attend(query, store, key, value, 9, logits, max_length=31, packed=others, rotate=True)
    options = {"max_length": 31, "stride": None, "packed": cleaned, "rotate": True}
    twin = reference.append_attend(query, before, key, value, 9, logits, **options)
    assert result.dtype == dtype and torch.equal(store.lengths, before.lengths)
    whole = decoded(store, others)
    turned = rotated(query.float())
    exact = rotated_back(oracle_attend(turned, whole, 0.125))
    assert_close(result, exact, twin, query_rounding(turned, whole, 0.125) * 80**0.5)


@needs_library
def test_packed_rows_move_as_bytes():
    torch.manual_seed(5)
    store = packed_of([3, 0, 60, 17], 64, 80).buffers
    ranks = torch.cat([torch.randperm(n) for n in store.lengths.tolist()]).to(torch.int32)
    quota = torch.tensor([2, 5, 31, 0])
    left, twin = native.evict(store, ranks, quota, 0), selection_reference.evict(store, ranks, quota, 0)
    assert_same_buffers(left[0], twin[0])
    grown, twin_grown = (copied(packed_of(store.lengths.tolist(), 64, 80).buffers) for _ in range(2))
    for buffer, other in zip(grown, twin_grown):
        other.copy_(buffer)
    native.move_rows(grown, store, max_length=60)
    reference.move_rows(twin_grown, store, total=80)
    assert_same_buffers(grown, twin_grown)


@needs_library
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("size, value_size", [(16, 16), (64, 64), (80, 112), (128, 128), (256, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_equals_oracle(dtype, size, value_size, groups):
    torch.manual_seed(size + groups)
    store = coded(make_store(UNEVEN, size, value_size, dtype))
    query = strided(2, 4 * groups, 1, size, dtype)
    options = {
        "scaling": size**-0.5,
        "softcap": 20.0 if groups == 2 else None,
        "sinks": torch.randn(4 * groups) if groups == 3 else None,
    }
    result = native.attend(query, store, LogitOptions(**options), max_length=700)
    twin = reference.attend(query, clean(store), LogitOptions(**options), max_length=700, stride=None)
    exact = oracle_attend(query, decoded(store), **options)
    twin.view(2, 4, groups, value_size)[0, 0] = 0.0  # the twin has no answer for a sequence without rows
    assert result.dtype == dtype and result.shape == (2, 1, 4 * groups, value_size)
    assert_close(result, exact, twin, query_rounding(query, clean(decoded(store)), size**-0.5))
    assert_close(twin, exact, exact.to(dtype))


@needs_library
@pytest.mark.parametrize("threads", [2, 5])
def test_attend_splits_long_sequences(threads):
    torch.manual_seed(1)
    store = coded(make_store([40, 30000, 2, 700, 0, 0], 64, 64, torch.float32))
    query = torch.randn(1, 18, 1, 64) * 2
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        result = native.attend(query, store, LogitOptions(0.125), max_length=30000)
    finally:
        torch.set_num_threads(before)
    exact = oracle_attend(query, decoded(store), 0.125)
    assert_close(result, exact, extra=query_rounding(query, clean(decoded(store)), 0.125))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups, new", [(1, 40), (3, 7), (4, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_extend_equals_oracle(dtype, groups, new, masked):
    torch.manual_seed(4)
    store = coded(make_store([0, 1, 150, 4], 80, 64, dtype))
    query, key = strided(2, 2 * groups, new, 80, dtype), strided(2, 2, new, 80, dtype)
    value = strided(2, 2, new, 64, dtype)
    mask = (torch.rand(2, 1, new, new) < 0.5) | torch.eye(new, dtype=torch.bool) if masked else None
    logits = LogitOptions(0.11)
    result = native.attend_extend(query, store, key, value, logits, mask=mask, max_length=150)
    twin = reference.attend_extend(query, clean(store), key, value, logits, mask=mask, max_length=150, stride=None)
    exact = oracle_extend(query, decoded(store), key, value, mask, 0.11)
    assert_close(result, exact, twin, query_rounding(query, clean(decoded(store)), 0.11))
    assert_close(twin, exact, exact.to(dtype))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("new, padded", [(1, False), (1, True), (5, False), (5, True)])
def test_append_equals_twin(dtype, new, padded):
    torch.manual_seed(2)
    store = coded(make_store([0, 1, 77, 4], 80, 48, dtype, spare=5))
    key, value = strided(2, 2, new, 80, dtype), strided(2, 2, new, 48, dtype) * 1e-4
    valid = torch.tensor([[i % 2 == 0 for i in range(new)], [i > 0 for i in range(new)]]) if padded else None
    expected = copied(store)
    reference.append(expected, key, value, 900, valid)
    native.append(store, key, value, 900, valid)
    assert_same_buffers(store, expected)


@needs_library
def test_append_attend_equals_both():
    torch.manual_seed(3)
    store = coded(make_store([0, 1, 77, 4], 64, 64, torch.bfloat16))
    other = copied(store)
    query, key, value = (strided(2, heads, 1, 64, torch.bfloat16) for heads in (6, 2, 2))
    result = native.append_attend(query, store, key, value, 31, LogitOptions(0.1), max_length=78)
    native.append(other, key, value, 31)
    assert torch.equal(result, native.attend(query, other, LogitOptions(0.1), max_length=78))
    assert_same_buffers(store, other)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_move_and_evict_equal_twins(dtype):
    torch.manual_seed(5)
    key, value = strided(2, 2, 60, 64, dtype), strided(2, 2, 60, 80, dtype)
    counts = torch.tensor([[3, 0], [60, 17]])
    positions = torch.cat([torch.randperm(60)[:n].sort().values for n in counts.flatten().tolist()]).to(torch.int32)
    store = native.gather(key, value, positions, counts, codes=True)
    twin = selection_reference.gather(key, value, positions, counts, codes=True)
    assert_same_buffers(store, twin)
    assert store.key.dtype == torch.int8 and len(store.rows) == 5

    ranks = torch.cat([torch.randperm(n) for n in counts.flatten().tolist()]).to(torch.int32)
    quota = torch.tensor([2, 5, 31, 0])
    left, twin_left = native.evict(store, ranks, quota, 0), selection_reference.evict(store, ranks, quota, 0)
    assert_same_buffers(left[0], twin_left[0])
    assert torch.equal(left[1], twin_left[1])

    grown, twin_grown = (copied(coded(make_store(store.lengths.tolist(), 64, 80, dtype))) for _ in range(2))
    native.move_rows(grown, store, max_length=60)
    reference.move_rows(twin_grown, store, total=80)
    assert_same_buffers(grown, twin_grown)


@needs_library
@pytest.mark.parametrize(
    "change",
    [
        {"key_scale": None},
        {"key_scale": torch.zeros(3, dtype=torch.float16)},
        {"value_scale": torch.zeros(22)},
        {"key": torch.zeros(22, 64)},
    ],
)
def test_wrong_buffers_are_refused(change):
    store = coded(make_store([4, 4], 64, 64, torch.float32))
    with pytest.raises(RuntimeError):
        native.attend(torch.randn(1, 2, 1, 64), store._replace(**change), LogitOptions(0.1), max_length=4)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"rotate": True}, {"rotate": True, "pack": True}], ids=["int8", "rotated", "int4"])
def test_what_is_no_number_is_not_hidden(dtype, options):
    key, value = torch.randn(1, 1, 6, 64).to(dtype), torch.randn(1, 1, 6, 64).to(dtype)
    key[0, 0, 2, 37], value[0, 0, 4, 0] = torch.nan, torch.nan
    every, counts = torch.arange(6, dtype=torch.int32), torch.tensor([[6]])
    for library in (native, selection_reference):
        store = library.gather(key, value, every, counts, codes=True, **options)
        assert store.key_scale[:6].isnan().nonzero().tolist() == [[2]]
        assert store.value_scale[:6].isnan().nonzero().tolist() == [[4]]
