"""The compiled operations that rank and select, against their twins in plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import DTYPES, make_store, needs_library, strided

from mixkv.ops import native, score_reference, selection_reference


def left_padded(batch, heads, length, pad):
    """Bool [batch, heads, length]: ``pad`` tokens less of the first batch row are real than of the others."""
    real = torch.ones(batch, heads, length, dtype=torch.bool)
    real[0, :, :pad] = False
    return real


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length,size", [(1, 64), (33, 80), (1030, 16), (300, 256)])
@pytest.mark.parametrize("pad", [None, 0, 17])
def test_directions_and_norms(dtype, length, size, pad):
    torch.manual_seed(3)
    key = strided(2, 3, length, size, dtype) + 0.5
    valid = None if pad is None else left_padded(2, 3, length, pad)
    mine, twin = native.directions(key, valid), score_reference.directions(key, valid)
    unit = key.double() / key.double().norm(dim=-1, keepdim=True)
    real = torch.ones(2, 3, length, dtype=torch.bool) if valid is None else valid
    exact = (unit * real.unsqueeze(-1)).sum(dim=2) / real.sum(dim=-1, keepdim=True).clamp(min=1)
    for name in ("inverse_norm", "mean", "count"):
        torch.testing.assert_close(getattr(mine, name), getattr(twin, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.mean.double(), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(native.similarity(key, twin), score_reference.similarity(key, twin), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(native.redundancy(twin), score_reference.redundancy(twin), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(native.norm(key), score_reference.norm(key), rtol=1e-6, atol=1e-6)
    assert native.norm(key).dtype == torch.float32


@needs_library
def test_a_padded_prompt_has_the_numbers_it_has_alone():
    torch.manual_seed(4)
    key, raw, reference = torch.randn(2, 3, 700, 64), torch.randn(2, 3, 700), torch.rand(2, 3, 700)
    valid = left_padded(2, 3, 700, 123)
    alone = native.directions(key[:1, :, 123:], None)
    padded = native.directions(key, valid)
    assert torch.equal(padded.mean[:1], alone.mean) and torch.equal(padded.inverse_norm[:1, :, 123:], alone.inverse_norm)
    matched = native.match(raw, reference, valid)
    assert torch.equal(matched[:1, :, 123:], native.match(raw[:1, :, 123:], reference[:1, :, 123:], None))
    assert (matched[:1, :, :123] == 0).all()


@needs_library
@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 40),
    pad=st.integers(0, 41),
    kind=st.sampled_from(["numbers", "constant", "nan", "infinite"]),
    seed=st.integers(0, 999),
)
def test_match_and_mix(batch, heads, length, pad, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    raw, reference = (
        torch.randn(batch, heads, length, generator=generator),
        torch.rand(batch, heads, length, generator=generator),
    )
    if kind != "numbers":
        raw[0, 0] = {"constant": 2.0, "nan": torch.nan, "infinite": torch.inf}[kind]
    for valid in (left_padded(batch, heads, length, pad), left_padded(batch, 1, length, pad), None):
        mine, twin = native.match(raw, reference, valid), score_reference.match(raw, reference, valid)
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-6, equal_nan=True)
        share, size = torch.rand(batch, heads, generator=generator), torch.rand(batch, heads, length, generator=generator)
        given = (reference, raw, size, share, valid)
        mine, twin = native.mix(*given), score_reference.mix(*given)
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-6, equal_nan=True)


@needs_library
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_normalized(exponent):
    torch.manual_seed(5)
    importance = torch.rand(3, 2, 40) * torch.tensor([1e-6, 1.0, 0.0]).view(3, 1, 1)
    importance[:, :, :7] = -torch.inf
    mine = native.normalized(importance, exponent)
    torch.testing.assert_close(mine, score_reference.normalized(importance, exponent), rtol=1e-6, atol=0)
    assert native.normalized(importance[..., :0], exponent).shape == (3, 2, 0)


@needs_library
@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(0, 30),
    width=st.integers(0, 5),
    padded=st.booleans(),
    seed=st.integers(0, 999),
)
def test_take(batch, heads, length, width, padded, seed):
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(batch, heads, length, generator=generator).argsort(-1).to(torch.int32)
    entries = torch.randint(0, length + 1, (batch, heads), generator=generator)
    window = torch.rand(batch, 1, width, generator=generator) < 0.5 if padded else None
    for mine, twin in zip(
        native.take(ranks, entries, window, width), selection_reference.take(ranks, entries, window, width), strict=True
    ):
        assert mine.dtype == twin.dtype and torch.equal(mine, twin)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6), tail=st.integers(0, 4), seed=st.integers(0, 999))
def test_evict(dtype, lengths, tail, seed):
    generator = torch.Generator().manual_seed(seed)
    store = make_store([length + tail for length in lengths], 64, 80, dtype)
    ranks = torch.cat([torch.randperm(length, generator=generator) - 1 for length in lengths]).to(torch.int32)
    quota = torch.randint(0, 20, (len(lengths),), generator=generator)
    (mine, left), (twin, expected) = (
        native.evict(store, ranks, quota, tail),
        selection_reference.evict(store, ranks, quota, tail),
    )
    assert torch.equal(left, expected)
    for name, one, other in zip(mine._fields, mine, twin, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[[3, 0, 200], [7, 1, 40]], [[0, 0, 0], [0, 0, 0]]], ids=str)
def test_gather(dtype, counts):
    counts = torch.tensor(counts)
    key, value = strided(2, 3, 300, 64, dtype), strided(2, 3, 300, 80, dtype)
    kept = [torch.randperm(300)[:count].sort().values for count in counts.flatten().tolist()]
    positions = torch.cat(kept).to(torch.int32)
    mine, twin = native.gather(key, value, positions, counts), selection_reference.gather(key, value, positions, counts)
    for name, one, other in zip(mine._fields, mine, twin, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name


@needs_library
@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    layers=st.integers(1, 4),
    size=st.integers(0, 20),
    levels=st.integers(2, 40),
    seed=st.integers(0, 999),
)
def test_merge_largest(batch, heads, layers, size, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    totals = torch.randint(0, heads * size + 2, (batch,), generator=generator)
    within = torch.randint(0, heads * size + 2, (batch,), generator=generator)
    mine = twin = (torch.empty(batch, 0), torch.empty(batch, 0, dtype=torch.int32))
    for layer in range(1, layers + 1):
        importance = torch.randint(0, levels, (batch, heads, size), generator=generator).float()
        importance[importance == 0] = -torch.inf
        mine = native.merge_largest(*mine[:2], importance, within, totals, layer * heads)
        twin = selection_reference.merge_largest(*twin[:2], importance, within, totals, layer * heads)
        for one, other in zip(mine, twin, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


@needs_library
@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 30),
    pad=st.integers(0, 31),
    seed=st.integers(0, 999),
)
def test_ada_counts(batch, heads, length, pad, seed):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(batch, heads, length, generator=generator).masked_fill(
        ~left_padded(batch, heads, length, pad), -torch.inf
    )
    base = torch.randint(0, length + 1, (batch,), generator=generator)
    totals = (base * heads).minimum((importance >= 0).sum(dim=(1, 2)))
    mine, twin = (ops.ada_counts(importance, base, totals) for ops in (native, selection_reference))
    assert torch.equal(mine, twin) and torch.equal(mine.sum(dim=-1), totals)


@needs_library
@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(0, 3000),
    kind=st.sampled_from(["distinct", "tied", "one head tied", "nan", "zeros"]),
    seed=st.integers(0, 999),
)
def test_places(batch, heads, length, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(batch, heads, length, generator=generator) * 10.0 ** torch.randint(
        -30, 30, (batch, heads, 1), generator=generator
    )
    if kind == "tied":
        score = score.sign() * (score.abs() * 4).round()
    if kind == "one head tied":
        score[0, 0, : length // 2] = score[0, 0].sum()
    if kind == "nan":
        score[..., : length // 3] = torch.nan
    if kind == "zeros":
        score[..., ::2], score[..., 1::4] = 0.0, -0.0
    score[..., : length // 10] = -torch.inf
    assert torch.equal(native.places(score), selection_reference.places(score))


@needs_library
@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(0, 30),
    kernel=st.sampled_from([1, 3, 7, 41]),
    pooling=st.sampled_from(["avg", "max"]),
    with_nan=st.booleans(),
    seed=st.integers(0, 999),
)
def test_pool(length, kernel, pooling, with_nan, seed):
    attention = torch.rand(2, 3, length, generator=torch.Generator().manual_seed(seed))
    if with_nan:
        attention[0, 0, length // 2 :] = torch.nan
    for norm in (None, torch.rand(2, 3, length + 4)):
        mine, twin = (ops.pool(attention, kernel, pooling, norm) for ops in (native, score_reference))
        assert torch.equal(mine.nan_to_num(-1.0), twin.nan_to_num(-1.0))


@needs_library
def test_wrong_arguments_are_refused():
    store = make_store([3, 4], 64, 64, torch.float32)
    ranks = torch.zeros(7, dtype=torch.int32)
    for wrong in (
        lambda: native.norm(torch.zeros(1, 2, 5, 24)),
        lambda: native.directions(torch.zeros(1, 2, 5, 64).double(), None),
        lambda: native.match(torch.zeros(1, 2, 5), torch.zeros(1, 2, 4), None),
        lambda: native.take(torch.zeros(1, 2, 5, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int64), None, 3),
        lambda: native.mix(*(torch.zeros(1, 2, 5) for _ in range(3)), torch.zeros(1, 3), None),
        lambda: native.gather(torch.zeros(1, 2, 5, 64), torch.zeros(1, 2, 5, 64), ranks, torch.tensor([[3, 3]])),
        lambda: native.gather(torch.zeros(1, 2, 5, 64), torch.zeros(1, 2, 5, 64), ranks + 9, torch.tensor([[3, 4]])),
        lambda: native.places(torch.zeros(2, 3)),
        lambda: native.ada_counts(torch.zeros(1, 2, 5), torch.tensor([1, 2]), torch.tensor([2])),
        lambda: native.evict(store, ranks[:5], torch.ones(2, dtype=torch.int64), 0),
        lambda: native.evict(store, ranks[:0], torch.ones(2, dtype=torch.int64), 4),
        lambda: native.evict(store, ranks, torch.ones(3, dtype=torch.int64), 0),
        lambda: native.merge_largest(
            torch.zeros(1, 2), ranks[:2].view(1, 2) + 9, torch.zeros(1, 2, 3), torch.tensor([1]), torch.tensor([8]), 4
        ),
        lambda: native.pool(torch.zeros(1, 2, 5), 4, "avg"),
        lambda: native.pool(torch.zeros(1, 2, 5), 3, "max", torch.zeros(1, 2, 4)),
    ):
        with pytest.raises(RuntimeError):
            wrong()


@needs_library
def test_opcheck():
    key, ranks = torch.randn(1, 2, 9, 64), torch.arange(9, dtype=torch.int32).expand(1, 2, 9)
    store = make_store([3, 4], 64, 64, torch.float32)
    for name, arguments in (
        ("row_norms", (key,)),
        ("mean_directions", (key, None)),
        ("row_cosines", (key, torch.ones(1, 2, 9), torch.randn(1, 2, 64))),
        ("match", (torch.randn(1, 2, 9), torch.rand(1, 2, 9), left_padded(1, 2, 9, 3))),
        ("take", (ranks, torch.tensor([[3, 4]]), None, 2)),
        ("mean_cosine", (torch.randn(1, 2, 64), torch.ones(1, 2))),
        ("mix", (*(torch.rand(1, 2, 9) for _ in range(3)), torch.rand(1, 2), None)),
        ("normalized", (torch.rand(1, 2, 9), 0.5)),
        ("gather", (key, key, torch.arange(5, dtype=torch.int32), torch.tensor([[2, 3]]), 16, 0.125)),
        ("places", (torch.randn(1, 2, 9),)),
        ("ada_counts", (torch.rand(1, 2, 9), torch.tensor([2]), torch.tensor([4]))),
        ("pool", (torch.rand(1, 2, 9), torch.rand(1, 2, 11), 5, True)),
        ("evict", (*store, torch.arange(7, dtype=torch.int32), torch.tensor([2, 5]), 0, 16, 0.125)),
        (
            "merge_largest",
            (
                torch.randn(2, 3),
                torch.zeros(2, 3, dtype=torch.int32),
                torch.randn(2, 2, 4),
                torch.tensor([2, 3]),
                torch.tensor([5, 6]),
                4,
            ),
        ),
    ):
        torch.library.opcheck(getattr(torch.ops.mixkv, name).default, arguments)
