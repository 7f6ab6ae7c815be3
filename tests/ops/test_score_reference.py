"""Scores in blocks of tokens against the same in one piece, and the memory that compression takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import needs_library

from mixkv.ops import native_scores, score_reference
from mixkv.ops.arguments import LogitOptions
from mixkv.selection import scores

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def whole_weights(query, key, valid, scaling, softcap, sinks):
    """The softmax over all tokens at once: [B, Hkv, G, W, N]."""
    batch, query_heads, window, size = query.shape
    heads, length = key.shape[1], key.shape[2]
    folded = (query.float() * scaling).reshape(batch, heads, -1, size)
    logits = (folded @ key.float().transpose(-1, -2)).view(batch, heads, -1, window, length)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    future = torch.ones(window, window, dtype=torch.bool).triu(1)
    logits[..., length - window :].masked_fill_(future, -torch.inf)
    if valid is not None:
        logits.masked_fill_(~valid[:, :, None, None, :], -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, heads, -1, 1, 1).expand(batch, -1, -1, window, 1)
        logits = torch.cat([logits, column], dim=-1)
    return logits.softmax(dim=-1)[..., :length]


def whole_window_attention(query, key, valid, *, scaling, statistic, group_reduce, softcap, sinks):
    weights = whole_weights(query, key, valid, scaling, softcap, sinks)[..., : key.shape[2] - query.shape[2]]
    statistics = {"mean": weights.mean(dim=3), "rms": weights.square().mean(dim=3).sqrt(), "max": weights.amax(dim=3)}
    mass = statistics[statistic]
    mass = mass.amax(dim=2) if group_reduce == "max" else mass.mean(dim=2)
    return mass if valid is None else mass.nan_to_num(0.0)


def whole_directions(key, valid):
    real = valid.expand(key.shape[:3])
    inverse_norm = 1 / whole_norm(key).clamp(min=1e-12)
    count = real.sum(dim=-1).float()
    total = ((inverse_norm * real).unsqueeze(2) @ key.float()).squeeze(2)
    return scores.Directions(inverse_norm, total / count.clamp(min=1).unsqueeze(-1), count)


def whole_similarity(key, found):
    return (found.mean.unsqueeze(2) @ key.float().transpose(-1, -2)).squeeze(2) * found.inverse_norm


def whole_modal_redundancy(key, image, valid):
    text = ~image if valid is None else valid & ~image
    kinds = torch.stack([image, text], dim=1).unsqueeze(1)
    inverse_norm = 1 / torch.linalg.vector_norm(key, dim=-1, dtype=torch.float32).clamp(min=1e-12)
    count = kinds.sum(dim=-1).float()
    total = (kinds * inverse_norm.unsqueeze(2)) @ key.float()
    found = scores.Directions(inverse_norm, total / count.clamp(min=1).unsqueeze(-1), count)
    return scores.redundancy(found).masked_fill(count == 0, torch.nan)


def whole_norm(rows):
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)


def whole_projected_norm(value, factor):
    return whole_norm(value.float() @ factor.transpose(-1, -2))


@pytest.fixture(params=["one block", "many blocks"], scope="module")
def many(request):
    """Whether the prompts here take more than one block; in one the arithmetic is that of the functions above, to the bit."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many blocks":
            patch.setattr(score_reference, "_NUMBERS", 70)
            patch.setattr(score_reference, "_SHARE", 0)
        yield request.param == "many blocks"


def draw(batch, heads, groups, length, window, size, dtype, seed, pads):
    """query, key, value as models lay them out (tokens before heads), and which tokens are real, bool [B, 1, N]."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        (torch.randn(batch, count, many, size, generator=generator) * 2).to(dtype).transpose(1, 2)
        for count, many in ((min(window, length), heads * groups), (length, heads), (length, heads))
    )
    valid = torch.arange(length) >= torch.tensor(pads[:batch]).unsqueeze(-1).clamp(max=length - 1)
    return query, key, value, valid.unsqueeze(1)


def assert_same(mine, expected, many):
    if many:
        torch.testing.assert_close(mine, expected, rtol=2e-5, atol=1e-7, equal_nan=True)
    else:
        assert torch.equal(mine.nan_to_num(-1.0), expected.nan_to_num(-1.0))


SHAPES = dict(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 61),
    window=st.integers(1, 20),
    size=st.sampled_from([8, 10, 16]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
    pads=st.sampled_from([(0, 0, 0), (0, 5, 30), (20, 0, 60)]),
)


@pytest.mark.parametrize("statistic", ["mean", "rms", "max"])
@settings(max_examples=60, deadline=None)
@given(
    **SHAPES,
    groups=st.integers(1, 3),
    reduce=st.sampled_from(["mean", "max"]),
    softcap=st.sampled_from([None, 2.0]),
    with_sinks=st.booleans(),
)
def test_window_attention(many, statistic, reduce, softcap, with_sinks, groups, heads, **shape):
    query, key, _, valid = draw(heads=heads, groups=groups, **shape)
    sinks = torch.randn(query.shape[1]) if with_sinks else None
    logits, options = LogitOptions(0.3, softcap, sinks), {"statistic": statistic, "group_reduce": reduce}
    for mask in (valid, valid.expand(-1, heads, -1), *([None] if valid.all() else [])):
        mine = score_reference.window_attention(query, key, mask, logits, **options)
        assert_same(mine, whole_window_attention(query, key, mask, **vars(logits), **options), many)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [4096, 4097, 9001])
@pytest.mark.parametrize("statistic, softcap, with_sinks", [("mean", None, False), ("rms", 2.0, True)])
def test_compiled_window_attention_of_long_prompts(length, dtype, statistic, softcap, with_sinks):
    query, key, _, valid = draw(2, 1, 2, length, 20, 16, dtype, 3, (0, 4500))
    sinks = torch.randn(query.shape[1]) if with_sinks else None
    logits, options = LogitOptions(0.5, softcap, sinks), {"statistic": statistic, "group_reduce": "mean"}
    for mask in (valid, None):
        expected = whole_window_attention(query, key, mask, **vars(logits), **options)
        mine = native_scores.window_attention(query, key, mask, logits, **options)
        bound = 4e-3 if dtype == torch.bfloat16 else 1e-4
        # A token that is not valid may get what rounding leaves.
        torch.testing.assert_close(mine, expected, rtol=bound, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(**SHAPES, groups=st.integers(1, 3), softcap=st.sampled_from([None, 2.0]), with_sinks=st.booleans())
def test_attention_share(many, softcap, with_sinks, groups, heads, **shape):
    query, key, _, valid = draw(heads=heads, groups=groups, **shape)
    sinks = torch.randn(query.shape[1]) if with_sinks else None
    tokens = torch.rand(valid.shape) < 0.6
    mine = score_reference.attention_share(query, key, valid, tokens, LogitOptions(0.3, softcap, sinks))
    weights = whole_weights(query, key, valid, 0.3, softcap, sinks)
    expected = (weights * tokens[:, :, None, None]).sum(dim=-1).nan_to_num(0.0)
    torch.testing.assert_close(mine, expected, rtol=2e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_norms_and_directions(many, heads, **shape):
    _, key, value, valid = draw(heads=heads, groups=1, **shape)
    assert torch.equal(score_reference.norm(value), whole_norm(value))
    factor = torch.randn(heads, 5, value.shape[3])
    assert_same(score_reference.projected_norm(value, factor), whole_projected_norm(value, factor), many)
    found, expected = scores.directions(key, valid), whole_directions(key, valid)
    assert torch.equal(found.inverse_norm, expected.inverse_norm) and torch.equal(found.count, expected.count)
    if many:
        torch.testing.assert_close(found.mean, expected.mean, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(scores.similarity(key, expected), whole_similarity(key, expected), rtol=2e-5, atol=1e-6)
    else:
        assert torch.equal(found.mean, expected.mean)
        assert torch.equal(scores.similarity(key, expected), whole_similarity(key, expected))
    image = torch.rand(valid.shape[0], valid.shape[2]) < 0.5
    image &= valid[:, 0]
    for mask in (valid[:, 0], None):
        mine, modal = scores.modal_redundancy(key, image, mask), whole_modal_redundancy(key, image, mask)
        torch.testing.assert_close(mine, modal, rtol=1e-4, atol=1e-4 if many else 0, equal_nan=True)


@pytest.mark.parametrize("length, numbers", [(1, 1), (1024, 64), (1025, 64), (50000, 64), (5000, 4096), (3, 1 << 20)])
def test_blocks_are_counted_from_the_end(length, numbers):
    rows = torch.empty(1, 1, length, 64, dtype=torch.bfloat16)
    blocks = score_reference.token_blocks(rows, numbers)
    assert blocks[0][0] == 0 and blocks[-1][1] == length
    sizes = [last - first for first, last in blocks]
    assert all(before[1] == after[0] for before, after in zip(blocks, blocks[1:]))
    assert len(set(sizes[1:])) <= 1 and 0 < sizes[0] <= sizes[-1]
    assert max(sizes) <= max(1, (1 << 16) // numbers, rows.nbytes * 2 // 16 // (4 * numbers))
