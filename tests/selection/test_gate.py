"""The gate's score against one row after the other in float64, and its fit against a plain regression."""

import pytest
import torch

from mixkv import MixKVConfig
from mixkv.selection.context import Measured
from mixkv.selection.gate import GateFit, LayerGate, features, predict
from mixkv.selection.select import rank

PARTNER = torch.tensor([2, 3, 0, 1, 4])


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_features(key, value):
    """Of one row; elements 0 and 2, and 1 and 3, are rotated together, element 4 is not."""
    key, value = key.double(), value.double()
    pairs = [(key[0] ** 2 + key[2] ** 2) ** 0.5, (key[1] ** 2 + key[3] ** 2) ** 0.5, key[4]]
    return torch.stack([*pairs, *value, value.norm().log(), key.norm(), torch.tensor(1.0, dtype=torch.float64)])


def gate(heads, value_size):
    return LayerGate(0.3 * draw(heads, 3 + value_size + 3, seed=7) - 0.3, PARTNER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_prediction(dtype):
    key, value, mine = draw(2, 3, 11, 5, seed=0).to(dtype), draw(2, 3, 11, 4, seed=1).to(dtype), gate(3, 4)
    found = predict(key, value, mine)
    assert found.shape == (2, 3, 11) and found.dtype == torch.float32
    for row in range(2):
        for head in range(3):
            for token in range(11):
                logarithm = plain_features(key[row, head, token], value[row, head, token]) @ mine.weight[head].double()
                expected = (logarithm.exp() - 1e-5).clamp(0, 1)
                assert (found[row, head, token] - expected).abs() < 1e-5


def test_rotating_a_key_changes_nothing():
    key, value, angle = draw(1, 2, 50, 5, seed=0), draw(1, 2, 50, 4, seed=1), 3 * draw(1, 1, 50, 2, seed=2)
    first, second = key[..., :2], key[..., 2:4]
    turned = [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos(), key[..., 4:]]
    assert torch.allclose(features(key, value, PARTNER), features(torch.cat(turned, dim=-1), value, PARTNER), atol=1e-5)


def test_a_zero_row_is_finite():
    assert features(torch.zeros(1, 1, 2, 5), torch.zeros(1, 1, 2, 4), PARTNER).isfinite().all()


@pytest.mark.parametrize("padding", [0, 6])
def test_the_score_of_a_layer(padding):
    config = MixKVConfig(score="gate", method="snapkv", budget=12, window=5)
    query, key, value = draw(2, 4, 30, 5, seed=0), draw(2, 2, 30, 5, seed=1), draw(2, 2, 30, 4, seed=2)
    mask = torch.ones(2, 30)
    mask[0, :padding] = 0
    mine = gate(2, 4)
    found = rank(query, key, value, config, attention_mask=mask, measured=Measured(gate=mine)).scores
    expected = predict(key, value, mine)[..., :25]
    for row, first in enumerate([padding, 0]):
        expected[row, :, :first], expected[row, :, first : first + 4] = -torch.inf, 1.0
    assert torch.equal(found, expected)
    if padding == 0:
        assert torch.equal(rank(query, key, value, config, measured=Measured(gate=mine)).scores, expected)


@pytest.mark.parametrize("padding", [0, 6])
def test_the_larger_of_gate_and_output_importance(padding):
    config = MixKVConfig(score="gate-output", method="snapkv", budget=12, window=5)
    query, key, value = draw(2, 4, 30, 5, seed=0), draw(2, 2, 30, 5, seed=1), draw(2, 2, 30, 4, seed=2)
    mask = torch.ones(2, 30)
    mask[0, :padding] = 0
    measured, options = Measured(gate=gate(2, 4)), {"attention_mask": mask}
    found, alone, output = (
        rank(query, key, value, config.replace(score=score), **options, measured=measured).scores
        for score in ("gate-output", "gate", "output")
    )
    for row, first in enumerate([padding, 0]):
        assert (found[row, :, :first] == -torch.inf).all()
        share = output[row, :, first:] / output[row, :, first:].max()
        assert torch.allclose(found[row, :, first:], alone[row, :, first:].maximum(share))
    assert (found > alone).any() and (found == alone).any()


def test_without_a_gate():
    config = MixKVConfig(score="gate", budget=12, window=5)
    with pytest.raises(ValueError, match="needs a gate that was fitted to the model"):
        rank(draw(1, 2, 30, 5, seed=0), draw(1, 2, 30, 5, seed=1), draw(1, 2, 30, 5, seed=2), config)


def test_the_fit_is_that_of_plain_least_squares():
    fit, rows, wanted = GateFit(PARTNER), [[], []], [[], []]
    for seed, (batch, length) in enumerate([(1, 300), (2, 150)]):
        key, value = draw(batch, 2, length, 5, seed=seed), draw(batch, 2, length, 4, seed=10 + seed)
        replay = draw(batch, 2, length, seed=20 + seed).sigmoid()
        used = torch.ones(batch, length, dtype=torch.bool)
        used[0, :4] = False
        fit.add(key, value, replay, used)
        for row in range(batch):
            for head in range(2):
                for token in used[row].nonzero().flatten().tolist():
                    rows[head].append(plain_features(key[row, head, token], value[row, head, token]))
                    wanted[head].append((replay[row, head, token].double() + 1e-5).log())
    for head in range(2):
        x, y = torch.stack(rows[head]), torch.stack(wanted[head])
        exact = torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1)
        assert ((x @ (fit.solve().weight[head].double() - exact)).abs().max()) < 0.05
