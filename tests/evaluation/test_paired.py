"""Paired statistics."""

import torch

from mixkv.evaluation import paired


def test_paired_statistics():
    reference = [1.0, 2.0, 3.0, 4.0] * 10
    assert paired.relative_change(reference, reference) == (0, 0, 0)
    change, low, high = paired.relative_change([value / 2 for value in reference], reference)
    assert change == low == high == -0.5
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    change, low, high = paired.relative_change([2 + value / 4 for value in noise], [2.0] * 200)
    assert low < 0 < high and low < change < high and high - low < 0.1
    change, low, high = paired.difference([1.0] * 30 + [0.0] * 10, [0.0] * 40)
    assert change == 0.75 and 0.55 < low < 0.75 < high < 0.95


def test_configurations_are_compared_at_equal_bytes():
    configs = [dict(method=method, score="mix", budget=budget) for method in ("snapkv", "hybridkv") for budget in (0.1, 0.2)]
    resident, kl = [0.1, 0.2, 0.13, 0.23], [4.0, 2.0, 1.0, 0.5]
    results = [dict(kl=loss, top1=0.5, kept=0, resident=share) for loss, share in zip(kl, resident)]
    records = [dict(task="prose", tokens=8, seed=seed, answered=None, results=results) for seed in range(3)]
    changes = [row["kl_change"] for row in paired.summary(records, configs, ("snapkv", "mix"), equal_bytes=True)]
    assert changes == [0.0, 0.0, -0.5, None]
    assert [row["kl_change"] for row in paired.summary(records, configs, ("snapkv", "mix"))] == [0.0, 0.0, -0.75, -0.75]
