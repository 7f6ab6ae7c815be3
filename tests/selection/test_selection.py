"""select: totals, every prompt length, padding, precision, and its errors."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import measured_for, options_for

from mixkv import MixKVConfig, registry, select

METHODS, SCORES = list(registry.METHODS), list(registry.SCORES)


def draw(batch, heads, groups, length, window, size=16, seed=0, offset=1.0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads * groups, min(window, length), size, generator=generator)
    key = torch.randn(batch, heads, length, size, generator=generator) + offset * torch.randn(
        heads, 1, size, generator=generator
    )
    return query, key, torch.randn(batch, heads, length, size, generator=generator)


def config_for(method, **options):
    """Under hybridkv every head is static: what `select` gives is all that it keeps."""
    return MixKVConfig(hybrid_threshold=0.0, **options_for(method, layers=2, heads=2), **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 19, 20, 21, 50])
@pytest.mark.parametrize("score", SCORES)
def test_every_length_from_one(method, length, score):
    """N in {1, 2, W - 1, W, W + 1, budget - 1, budget, budget + 1, more}: totals over the model are exact."""
    config = config_for(method, score=score, budget=20, window=8)
    query, key, value = draw(2, 2, 2, length, 8)
    place = {"num_layers": 2, "measured": measured_for(score, key)}
    kept = [select(query, key, value, config, layer_idx=layer, **place) for layer in range(2)]
    total = sum(selection.lengths.sum(dim=-1) for selection in kept)
    assert total.tolist() == [4 * min(20, length)] * 2
    for selection in kept:
        assert selection.flat_positions.numel() == selection.lengths.sum()
        for row in selection.positions:
            for positions in row:
                assert (positions[1:] > positions[:-1]).all()
                assert positions[-min(8, length) :].tolist() == list(range(max(length - 8, 0), length))


@pytest.mark.parametrize("budget, length, rows", [(0.5, 60, 30), (0.25, 61, 15), (1.0, 40, 40), (0.01, 50, 8), (0.99, 3, 3)])
def test_share_of_the_prompt(budget, length, rows):
    query, key, value = draw(1, 2, 2, length, 8)
    for method in METHODS:
        lengths = [
            select(query, key, value, config_for(method, budget=budget, window=8), layer_idx=layer, num_layers=2).lengths
            for layer in range(2)
        ]
        assert sum(part.sum() for part in lengths) == 4 * rows


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.sampled_from(SCORES),
    st.integers(1, 60),
    st.integers(0, 50),
    st.integers(9, 40),
    st.sampled_from([1, 3, 7]),
    st.sampled_from(["avg", "max"]),
    st.integers(0, 1000),
)
def test_padded_row_selects_what_it_selects_alone(method, score, length, pad, budget, kernel, pooling, seed):
    config = config_for(method, score=score, budget=budget, window=8, kernel_size=kernel, pooling=pooling)
    query, key, value = draw(1, 2, 2, length, 8, seed=seed)
    noise = [100 * torch.randn(1, part.shape[1], pad, 16) for part in (query, key, value)]
    full = [torch.cat(pair, dim=2) for pair in zip(noise, (query, key, value))]
    mask = (torch.arange(pad + length) >= pad).long().unsqueeze(0)
    measured = measured_for(score, full[1])
    own = dataclasses.replace(measured, replay=None if measured.replay is None else measured.replay[..., pad:])
    alone = select(query, key, value, config, layer_idx=1, num_layers=2, measured=own)
    padded = select(*full, config, layer_idx=1, num_layers=2, attention_mask=mask, measured=measured)
    assert torch.equal(alone.lengths, padded.lengths)
    assert torch.equal(alone.flat_positions + pad, padded.flat_positions)
    assert torch.allclose(alone.redundancy, padded.redundancy, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_selects_what_float32_selects(dtype, method):
    config = config_for(method, budget=64, window=16)
    query, key, value = draw(1, 2, 4, 500, 16, size=64, offset=6.0)
    low = [part.to(dtype) for part in (query, key, value)]
    exact = select(*(part.float() for part in low), config, num_layers=2)
    mine = select(*low, config, num_layers=2)
    shared = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(exact.positions[0], mine.positions[0]))
    assert shared >= 0.98 * exact.flat_positions.numel()
    rounded = select(query, key, value, config, num_layers=2)
    shared = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(rounded.positions[0], mine.positions[0]))
    assert shared >= 0.95 * exact.flat_positions.numel()


@pytest.mark.parametrize("size", [64, 80, 96, 112, 128, 256])
def test_head_sizes(size):
    query, key, value = draw(1, 2, 2, 90, 8, size=size)
    assert select(query, key, value, MixKVConfig(budget=20, window=8)).lengths.sum() == 40


def test_forced_lengths_and_given_redundancy():
    query, key, value = draw(1, 2, 2, 50, 8)
    config = MixKVConfig(budget=20, window=8)
    lengths = torch.tensor([[9, 31]])
    selection = select(query, key, value, config, lengths=lengths, redundancy=torch.tensor([0.0, 1.0]))
    assert torch.equal(selection.lengths, lengths)
    assert selection.redundancy.tolist() == [[0.0, 1.0]]
    plain = select(query, key, value, config.replace(score="vnorm"), lengths=lengths)
    assert torch.equal(selection.positions[0][0], plain.positions[0][0])
    diverse = select(query, key, value, config.replace(score="keydiff"), lengths=lengths)
    assert torch.equal(selection.positions[0][1], diverse.positions[0][1])


def test_redundancy_table():
    query, key, value = draw(1, 2, 2, 50, 8)
    config = MixKVConfig(budget=20, window=8, redundancy=[[0.1, 0.2], [0.3, 0.4]])
    assert torch.allclose(select(query, key, value, config, layer_idx=1, num_layers=2).redundancy, torch.tensor([[0.3, 0.4]]))
    with pytest.raises(ValueError, match=r"\[2, 2\].*3 compressed layers"):
        select(query, key, value, config, layer_idx=1, num_layers=3)


def test_bad_shapes_are_refused():
    query, key, value = draw(1, 2, 2, 50, 8)
    config = MixKVConfig(budget=20, window=8)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        select(query[:, :3], key, value, config)
    with pytest.raises(ValueError, match="7 queries for 50 keys"):
        select(query[:, :, 1:], key, value, config)
    with pytest.raises(ValueError, match="equal B, Hkv, N"):
        select(query, key, value[:, :1], config)
    with pytest.raises(ValueError, match="left"):
        select(query, key, value, config, attention_mask=torch.tensor([[1] * 49 + [0]]))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 49\]"):
        select(query, key, value, config, attention_mask=torch.ones(1, 49))
    with pytest.raises(ValueError, match="lengths"):
        select(query, key, value, config, lengths=torch.tensor([[3, 40]]))
