"""The compiled operations that rank and select, against their twins in plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import DTYPES, make_store, needs_library, strided

from mixkv.ops import mixing_reference, native, native_scores, score_reference, selection_reference
from mixkv.ops.arguments import LogitOptions


def left_padded(batch, heads, length, pad):
    """Bool [batch, heads, length]: ``pad`` tokens less of the first batch row are real than of the others."""
    real = torch.ones(batch, heads, length, dtype=torch.bool)
    real[0, :, :pad] = False
    return real


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length,size", [(1, 64), (33, 80), (1030, 16), (300, 256)])
@pytest.mark.parametrize("pad", [None, 0, 17])
def test_diversity_and_norms(dtype, length, size, pad):
    torch.manual_seed(3)
    key = strided(2, 3, length, size, dtype) + 0.5
    valid = None if pad is None else left_padded(2, 3, length, pad)
    mine, twin = native_scores.diversity(key, valid), score_reference.diversity(key, valid)
    unit = key.double() / key.double().norm(dim=-1, keepdim=True)
    real = torch.ones(2, 3, length, dtype=torch.bool) if valid is None else valid
    mean = (unit * real.unsqueeze(-1)).sum(dim=2) / real.sum(dim=-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(mine[0].double(), (unit @ mean.unsqueeze(-1)).squeeze(-1), rtol=1e-5, atol=1e-6)
    for one, other in zip(mine, twin, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(native_scores.norm(key), score_reference.norm(key), rtol=1e-6, atol=1e-6)
    assert native_scores.norm(key).dtype == torch.float32


@needs_library
def test_a_padded_prompt_has_the_numbers_it_has_alone():
    torch.manual_seed(4)
    key, raw, reference = torch.randn(2, 3, 700, 64), torch.randn(2, 3, 700), torch.rand(2, 3, 700)
    valid = left_padded(2, 3, 700, 123)
    alone, padded = native_scores.diversity(key[:1, :, 123:], None), native_scores.diversity(key, valid)
    assert torch.equal(padded[0][:1, :, 123:], alone[0]) and torch.equal(padded[1][:1], alone[1])
    matched = native_scores.match(raw, reference, valid)
    assert torch.equal(matched[:1, :, 123:], native_scores.match(raw[:1, :, 123:], reference[:1, :, 123:], None))
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
        mine, twin = native_scores.match(raw, reference, valid), mixing_reference.match(raw, reference, valid)
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-6, equal_nan=True)
        share, size = torch.rand(batch, heads, generator=generator), torch.rand(batch, heads, length, generator=generator)
        given = (reference, raw, size, share, valid)
        mine, twin = native_scores.mix(*given), mixing_reference.mix(*given)
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-6, equal_nan=True)


@needs_library
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_normalized(exponent):
    torch.manual_seed(5)
    importance = torch.rand(3, 2, 40) * torch.tensor([1e-6, 1.0, 0.0]).view(3, 1, 1)
    importance[:, :, :7] = -torch.inf
    mine = native_scores.normalized(importance, exponent)
    torch.testing.assert_close(mine, mixing_reference.normalized(importance, exponent), rtol=1e-6, atol=0)
    assert native_scores.normalized(importance[..., :0], exponent).shape == (3, 2, 0)


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
    for name in mine._fields[:5]:
        one, other = getattr(mine, name), getattr(twin, name)
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert mine[5:] == twin[5:] == (None, None)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[[3, 0, 200], [7, 1, 40]], [[0, 0, 0], [0, 0, 0]]], ids=str)
def test_gather(dtype, counts):
    counts = torch.tensor(counts)
    key, value = strided(2, 3, 300, 64, dtype), strided(2, 3, 300, 80, dtype)
    kept = [torch.randperm(300)[:count].sort().values for count in counts.flatten().tolist()]
    positions = torch.cat(kept).to(torch.int32)
    mine, twin = native.gather(key, value, positions, counts), selection_reference.gather(key, value, positions, counts)
    for name in mine._fields[:5]:
        one, other = getattr(mine, name), getattr(twin, name)
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert mine[5:] == twin[5:] == (None, None)


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
    own_totals = torch.randint(0, heads * size + 2, (batch,), generator=generator)
    limits = (
        *torch.randint(0, size + 1, (2, batch), generator=generator),
        torch.randint(0, 5 << 20, (batch, layers * heads), generator=generator),
        torch.randint(0, size + 1, (batch, layers * heads), generator=generator),
        0.3,
    )
    kinds = (torch.float32, torch.int32, torch.int64, torch.int64, torch.int64)
    mine = twin = selection_reference.Largest(*(torch.empty(batch, 0, dtype=kind) for kind in kinds))
    for _ in range(layers):
        importance = torch.randint(0, levels, (batch, heads, size), generator=generator).float()
        importance[importance == 0] = -torch.inf
        mine = native.merge_largest(mine, importance, own_totals, totals, *limits)
        twin = selection_reference.merge_largest(twin, importance, own_totals, totals, *limits)
        for name, one, other in zip(mine._fields, mine, twin, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), name


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
    length=st.integers(1, 60),
    window=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 7, 41]),
    pooling=st.sampled_from(["avg", "max"]),
    reduce=st.sampled_from(["mean", "max"]),
    weighted=st.sampled_from(["not", "by values", "by a factor"]),
    dtype=st.sampled_from(DTYPES),
    pad=st.integers(-1, 30),
    with_nan=st.booleans(),
    seed=st.integers(0, 999),
)
def test_importance(length, window, kernel, pooling, reduce, weighted, dtype, pad, with_nan, seed):
    torch.manual_seed(seed)
    window = min(window, length)
    query, key, value = (strided(2, heads, rows, 64, dtype) for heads, rows in ((6, window), (3, length), (3, length)))
    valid = None if pad < 0 else left_padded(2, 3, length, min(pad, length - window))
    if with_nan:
        value[0, 0, length // 2] = torch.nan
    options = {
        "group_reduce": reduce,
        "kernel_size": kernel,
        "pooling": pooling,
        "value": None if weighted == "not" else value,
        "factor": torch.randn(3, 10, 64) if weighted == "by a factor" else None,
    }
    logits = LogitOptions(0.1, 5.0, torch.randn(6))
    mine, twin = (ops.importance(query, key, valid, logits, **options) for ops in (native_scores, score_reference))
    assert mine.shape == twin.shape == (2, 3, length - window)
    bound = 2e-2 if dtype == torch.bfloat16 else 2e-4
    torch.testing.assert_close(mine, twin, rtol=bound, atol=1e-6, equal_nan=True)


@needs_library
def test_wrong_arguments_are_refused():
    store = make_store([3, 4], 64, 64, torch.float32)
    ranks = torch.zeros(7, dtype=torch.int32)
    key, owners, counts = torch.zeros(1, 2, 5, 64), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int64)
    both = torch.zeros(1, 4, dtype=torch.int64)
    largest = selection_reference.Largest(torch.zeros(1, 2), owners, counts, counts, counts)
    limits = (torch.tensor([1]), torch.tensor([8]), torch.tensor([2]), torch.tensor([5]), both, both, 0.2)
    for wrong in (
        lambda: native_scores.norm(torch.zeros(1, 2, 5, 24)),
        lambda: native_scores.diversity(torch.zeros(1, 2, 5, 64).double(), None),
        lambda: native_scores.match(torch.zeros(1, 2, 5), torch.zeros(1, 2, 4), None),
        lambda: native.take(torch.zeros(1, 2, 5, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int64), None, 3),
        lambda: native_scores.mix(*(torch.zeros(1, 2, 5) for _ in range(3)), torch.zeros(1, 3), None),
        lambda: native.gather(torch.zeros(1, 2, 5, 64), torch.zeros(1, 2, 5, 64), ranks, torch.tensor([[3, 3]])),
        lambda: native.gather(torch.zeros(1, 2, 5, 64), torch.zeros(1, 2, 5, 64), ranks + 9, torch.tensor([[3, 4]])),
        lambda: native.places(torch.zeros(2, 3)),
        lambda: native.ada_counts(torch.zeros(1, 2, 5), torch.tensor([1, 2]), torch.tensor([2])),
        lambda: native.evict(store, ranks[:5], torch.ones(2, dtype=torch.int64), 0),
        lambda: native.evict(store, ranks[:0], torch.ones(2, dtype=torch.int64), 4),
        lambda: native.evict(store, ranks, torch.ones(3, dtype=torch.int64), 0),
        lambda: native.merge_largest(largest._replace(owner=largest.owner + 9), torch.zeros(1, 2, 3), *limits),
        lambda: native.merge_largest(largest, torch.zeros(1, 3, 3), *limits),
        lambda: native.merge_largest(largest, torch.zeros(1, 2, 3), *limits[:2], limits[2].float(), *limits[3:]),
        lambda: native_scores.importance(key, key, None, LogitOptions(1.0), kernel_size=4, pooling="avg"),
        lambda: native_scores.importance(key, key, None, LogitOptions(1.0), kernel_size=3, pooling="max", value=key[:, :, 1:]),
    ):
        with pytest.raises(RuntimeError):
            wrong()


@needs_library
def test_opcheck():
    key, ranks = torch.randn(1, 2, 9, 64), torch.arange(9, dtype=torch.int32).expand(1, 2, 9)
    store = make_store([3, 4], 64, 64, torch.float32)
    for name, arguments in (
        ("row_norms", (key,)),
        ("diversity", (key, None)),
        ("match", (torch.randn(1, 2, 9), torch.rand(1, 2, 9), left_padded(1, 2, 9, 3))),
        ("take", (ranks, torch.tensor([[3, 4]]), None, 2)),
        ("mix", (*(torch.rand(1, 2, 9) for _ in range(3)), torch.rand(1, 2), None)),
        ("normalized", (torch.rand(1, 2, 9), 0.5)),
        ("gather", (key, key, torch.arange(5, dtype=torch.int32), torch.tensor([[2, 3]]), False, False, False, 16, 0.125)),
        ("places", (torch.randn(1, 2, 9),)),
        ("ada_counts", (torch.rand(1, 2, 9), torch.tensor([2]), torch.tensor([4]))),
        ("importance", (key[:, :, :2], key, key, torch.randn(2, 64, 64), None, 0.1, True, 0.0, None, 3, True)),
        ("evict", (*store, torch.arange(7, dtype=torch.int32), torch.tensor([2, 5]), 0, 16, 0.125)),
        (
            "merge_largest",
            (
                torch.randn(2, 3),
                torch.zeros(2, 3, dtype=torch.int32),
                torch.zeros(2, 2, dtype=torch.int64),
                torch.randn(2, 2, 4),
                torch.tensor([2, 3]),
                torch.tensor([5, 6]),
                torch.tensor([2, 1]),
                torch.tensor([4, 4]),
                torch.ones(2, 4, dtype=torch.int64),
                torch.ones(2, 4, dtype=torch.int64),
                0.2,
            ),
        ),
    ):
        torch.library.opcheck(getattr(torch.ops.mixkv, name).default, arguments)
