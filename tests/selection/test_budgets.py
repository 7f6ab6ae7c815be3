"""Budgets: exact totals, limits held, each method's own rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixkv
from mixkv.selection.apportion import apportion
from mixkv.selection.methods.adakv import ada
from mixkv.selection.methods.pyramidkv import pyramid
from mixkv.selection.methods.sparsemm import from_profile


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 60)), min_size=1, max_size=9), st.floats(0, 1))
def test_apportion_is_exact_and_within_limits(heads, fill):
    limit = torch.tensor([[most for _, most in heads]])
    total = (limit.sum(-1) * fill).long()
    weights = torch.tensor([[weight for weight, _ in heads]], dtype=torch.float64) + 1e-3
    shares = weights / weights.sum() * total
    got = torch.from_numpy(apportion(shares, total, limit))
    assert got.sum() == total
    assert (got >= 0).all() and (got <= limit).all()
    if (shares <= limit).all():
        assert (got - shares).abs().max() <= 1 + 1e-5


def test_apportion_gives_the_remainder_to_the_largest_fractions():
    shares = torch.tensor([[1.5, 2.25, 0.75, 2.5]])
    got = torch.from_numpy(apportion(shares, torch.tensor([7]), torch.full((1, 4), 9)))
    assert got.tolist() == [[2, 2, 1, 2]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 50), st.integers(1, 50), st.floats(0, 1), st.integers(0, 999))
def test_ada_totals(heads, base, length, floor, seed):
    attention = torch.rand(2, heads, length, generator=torch.Generator().manual_seed(seed))
    candidates = torch.tensor([[length] * heads, [max(length - 3, 0)] * heads])
    attention[1, :, : min(3, length)] = -torch.inf
    bases = torch.tensor([base, max(base - 1, 0)])
    got = ada(bases, candidates, attention, floor=floor)
    assert got.sum(-1).tolist() == torch.minimum(bases * heads, candidates.sum(-1)).tolist()
    assert (got <= candidates).all()
    assert (got[0] >= min(int(floor * min(base, length)), length)).all()


def test_ada_counts_the_largest_scores():
    attention = torch.tensor([[[9.0, 8, 7, 6, 1, 1, 1, 1], [5.0, 1, 1, 1, 1, 1, 1, 1]]])
    got = ada(torch.tensor([3]), torch.tensor([[8, 8]]), attention, floor=0.0)
    # Head 0's share of mass in its top 3 is 24/34, head 1's 7/12: weighted, four of the six largest scores are head 0's
    # (6.35, 5.65, 4.94, 4.24), then 2.92 of head 1, then 0.71 of head 0.
    assert got.tolist() == [[5, 1]]


@pytest.mark.parametrize(
    "layers, base, length", [(1, 40, 300), (2, 33, 300), (28, 224, 3000), (28, 96, 100), (5, 7, 7), (30, 96, 4000)]
)
def test_pyramid_falls_and_sums_exactly(layers, base, length):
    rows = [
        pyramid(torch.tensor([base]), torch.full((1, 2), length), layer_idx=layer, num_layers=layers, beta=20)[0]
        for layer in range(layers)
    ]
    per_layer = torch.stack(rows)
    assert per_layer.sum() == layers * 2 * min(base, length)
    assert (per_layer[:-1] >= per_layer[1:]).all()
    assert per_layer.max() <= length
    if layers > 1 and 2 * base - base // 20 <= length:
        assert per_layer[0, 0] == 2 * base - base // 20


@pytest.mark.parametrize("heads", [2, 6])
def test_profile_budgets(heads):
    profile = tuple(tuple(float(1 + layer * heads + head) for head in range(heads)) for layer in range(4))
    base, candidates = torch.tensor([50]), torch.full((1, 2), 400)
    rows = torch.stack([from_profile(base, candidates, profile, layer_idx=i, num_layers=4, floor=0.1)[0] for i in range(4)])
    assert rows.sum() == 50 * 8
    table = torch.tensor(profile).view(4, 2, -1).sum(-1)
    expected = table / table.sum() * 50 * 8 * 0.9 + 0.1 * 50
    assert (rows - expected).abs().max() <= 1


def test_profile_surplus_goes_to_other_heads():
    profile = ((100.0, 1.0), (1.0, 1.0))
    base, candidates = torch.tensor([30]), torch.full((1, 2), 40)
    rows = torch.stack([from_profile(base, candidates, profile, layer_idx=i, num_layers=2, floor=0.1)[0] for i in range(2)])
    assert rows.sum() == 120 and rows.max() == 40


def test_profile_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[3, 2\].*4 compressed layers of 2 KV heads"):
        from_profile(torch.tensor([9]), torch.full((1, 2), 40), ((1.0, 1.0),) * 3, layer_idx=0, num_layers=4, floor=0.1)


@pytest.mark.parametrize("budget", [256, 512])
def test_pyramid_keeps_a_prompt_shorter_than_the_budget_whole(budget):
    query, key, value = torch.randn(1, 4, 32, 16), torch.randn(1, 2, 36, 16), torch.randn(1, 2, 36, 16)
    config = mixkv.MixKVConfig(method="pyramidkv", budget=budget, window=32)
    for layer in (0, 3, 27):
        assert mixkv.select(query, key, value, config, layer_idx=layer, num_layers=28).lengths.tolist() == [[36, 36]]
