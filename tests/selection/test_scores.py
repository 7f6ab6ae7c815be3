"""Scores against their definitions, written out head by head in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import measured_for

from mixkv import MixKVConfig, registry
from mixkv.ops import score_reference
from mixkv.ops.arguments import LogitOptions
from mixkv.selection import ScoreContext, scores

shapes = st.tuples(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from([8, 10, 64]),
)


def draw(shape, seed=0, dtype=torch.float32):
    batch, heads, groups, length, window, size = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads * groups, min(window, length), size, generator=generator, dtype=dtype)
    key = torch.randn(batch, heads, length, size, generator=generator, dtype=dtype) + torch.randn(
        heads, 1, size, generator=generator
    )
    value = torch.randn(batch, heads, length, size, generator=generator, dtype=dtype)
    return query, key.to(dtype), value


def left_valid(batch, length, pads):
    return (torch.arange(length) >= torch.tensor(pads[:batch]).view(-1, 1)).view(batch, 1, length)


def naive_attention(query, key, valid, scaling, reduce, softcap=None, sinks=None):
    """Full softmax rows, sharded and averaged."""
    batch, query_heads, window, _ = query.shape
    heads, length = key.shape[1:3]
    groups = query_heads // heads
    rows = torch.zeros(batch, heads, groups, length - window, dtype=torch.float64)
    for b in range(batch):
        for h in range(query_heads):
            mass = []
            for w in range(window):
                logits = (key[b, h // groups].double() @ query[b, h, w].double()) * scaling
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                seen = valid[b if valid.shape[0] > 1 else 0, 0].clone()
                seen[length - window + w + 1 :] = False
                logits[~seen] = -torch.inf
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h].double().view(1)])
                mass.append(logits.softmax(-1)[: length - window].nan_to_num(0.0))
            rows[b, h // groups, h % groups] = torch.stack(mass).mean(0)
    return rows.amax(2) if reduce == "max" else rows.mean(2)


@settings(max_examples=40, deadline=None)
@given(
    shapes, st.integers(0, 99), st.sampled_from(["mean", "max"]), st.sampled_from([None, 2.0]), st.booleans(), st.integers(0, 9)
)
def test_window_attention_equals_full_softmax_rows(shape, seed, reduce, softcap, with_sinks, pad):
    query, key, _ = draw(shape, seed)
    batch, length, window = key.shape[0], key.shape[2], query.shape[2]
    valid = left_valid(batch, length, [0, min(pad, length - window)])
    sinks = torch.randn(query.shape[1]) if with_sinks else None
    logits = LogitOptions(0.3, softcap, sinks)
    mine = score_reference.window_attention(query, key, valid, logits, group_reduce=reduce)
    if valid.all():
        assert torch.equal(mine, score_reference.window_attention(query, key, None, logits, group_reduce=reduce))
    assert mine.dtype == torch.float32
    expected = naive_attention(query, key, valid, 0.3, reduce, softcap, sinks)
    assert torch.allclose(mine.double(), expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 99), st.integers(0, 5))
def test_redundancy_is_the_mean_cosine_between_pairs(shape, seed, pad):
    _, key, _ = draw(shape, seed)
    length = key.shape[2]
    pad = min(pad, length - 1)
    mine = scores.redundancy(scores.directions(key, left_valid(key.shape[0], length, [pad] * 2)))
    unit = torch.nn.functional.normalize(key[:, :, pad:].double(), dim=-1)
    cosine = unit @ unit.transpose(-1, -2)
    count = length - pad
    pairs = (cosine.sum((-1, -2)) - cosine.diagonal(dim1=-2, dim2=-1).sum(-1)) / max(count * (count - 1), 1)
    assert torch.allclose(mine.double(), pairs.clamp(0, 1) if count > 1 else torch.zeros_like(pairs), atol=1e-5)


def test_similarity_is_the_cosine_with_the_mean_direction():
    _, key, _ = draw((2, 2, 1, 30, 4, 16))
    unit = torch.nn.functional.normalize(key.double(), dim=-1)
    expected = (unit * unit.mean(2, keepdim=True)).sum(-1)
    found = scores.directions(key, torch.ones(1, 1, 30, dtype=torch.bool))
    assert torch.allclose(scores.similarity(key, found).double(), expected, atol=1e-6)


def test_match_gives_the_reference_mean_and_zeros_for_constants():
    raw, reference = torch.rand(2, 3, 20), torch.rand(2, 3, 20)
    valid = left_valid(2, 20, [0, 7])
    matched = scores.match(raw, reference, valid)
    for row, pad in enumerate((0, 7)):
        for head in range(3):
            part = raw[row, head, pad:]
            scaled = (part - part.min()) / (part.max() - part.min())
            expected = scaled * reference[row, head, pad:].mean() / scaled.mean()
            assert torch.allclose(matched[row, head, pad:], expected, rtol=1e-4, atol=1e-6)
            assert (matched[row, head, :pad] == 0).all()
    assert (scores.match(torch.full((1, 1, 9), 3.0), torch.rand(1, 1, 9), torch.ones(1, 1, 9, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_pool_counts_zeros_beyond_the_ends(pooling):
    attention = torch.rand(1, 2, 11)
    padded = torch.nn.functional.pad(attention, (2, 2))
    windows = padded.unfold(-1, 5, 1)
    expected = windows.amax(-1) if pooling == "max" else windows.mean(-1)
    assert torch.allclose(scores.pool(attention, 5, pooling), expected)


def context_for(score, query, key, value, **options):
    """Without pooling, so that importance is window attention as it is."""
    config = MixKVConfig(score=score, kernel_size=1, output_kernel_size=1, backend="torch")
    declared = registry.score(score).uses_output_importance
    return ScoreContext(query, key, value, config, uses_output_importance=declared, **options)


@pytest.mark.parametrize("score", ["attn", "vnorm", "knorm", "keydiff", "mix-fixed", "mix", "output", "mix-output"])
def test_a_score_is_its_formula(score):
    query, key, value = draw((1, 2, 2, 40, 8, 16))
    valid = torch.ones(1, 1, 40, dtype=torch.bool)
    attention = score_reference.window_attention(query, key, valid, LogitOptions(0.25))
    if "output" in score:
        attention = score_reference.window_attention(query, key, valid, LogitOptions(0.25), statistic="rms")
        attention = attention * value[:, :, :32].norm(dim=-1)
    share, found = torch.tensor([[0.3, 0.8]]), scores.directions(key, valid)
    head = slice(0, 32)
    diversity = scores.match(-scores.similarity(key, found)[..., head], attention, valid[..., head])
    value_norm = scores.match(value[:, :, head].norm(dim=-1), attention, valid[..., head])
    key_norm = scores.match(-key[:, :, head].norm(dim=-1), attention, valid[..., head])
    r = share.unsqueeze(-1)
    expected = {
        "attn": attention,
        "vnorm": attention + value_norm,
        "knorm": attention + key_norm,
        "keydiff": diversity,
        "mix-fixed": (diversity + attention + value_norm) / 3,
        "mix": r * diversity + (1 - r) * (attention + value_norm),
        "output": attention,
        "mix-output": r * diversity + (1 - r) * (attention + value_norm),
    }[score]
    context = context_for(score, query, key, value, given_redundancy=share)
    assert torch.allclose(registry.score(score).compute(context), expected, atol=1e-6)


@pytest.mark.parametrize("score", registry.SCORES)
@pytest.mark.parametrize("constant", ["keys", "values", "both"])
def test_constant_inputs_give_finite_scores(score, constant):
    query, key, value = draw((1, 2, 2, 40, 8, 16))
    key = torch.ones_like(key) if constant != "values" else key
    value = torch.zeros_like(value) if constant != "keys" else value
    context = context_for(score, query, key, value, measured=measured_for(score, key))
    assert torch.isfinite(context.redundancy).all()
    assert torch.isfinite(registry.score(score).compute(context)).all()
