"""budget="auto": every candidate whose score exceeds the threshold is kept, and no other."""

import pytest
import torch
from support.configs import measured_for

import mixkv
from mixkv import MixKVConfig, registry
from mixkv.selection.context import Measured
from mixkv.selection.select import select

COMPARABLE = [name for name, score in registry.SCORES.items() if score.comparable]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def above(scores, threshold, lengths, total, window):
    """Positions by batch row and head: candidates one by one, then the window."""
    return [
        [
            [at for at in range(total - length, total - window) if float(head[at]) > threshold]
            + list(range(max(total - window, total - length), total))
            for head in row
        ]
        for row, length in zip(scores, lengths)
    ]


@pytest.mark.parametrize("score", COMPARABLE)
@pytest.mark.parametrize("padding", [0, 7, 33])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_comparison(score, padding, quantile, dtype):
    config = MixKVConfig(score=score, budget="auto", window=5)
    query, key, value = (draw(2, heads, 37, 6, seed=seed).to(dtype) for seed, heads in enumerate((4, 2, 2)))
    mask = torch.ones(2, 37)
    mask[0, :padding] = 0
    options = {"attention_mask": mask} if padding else {}
    options["measured"] = measured_for(score, key)
    scores = select(query, key, value, config, **options).scores
    threshold = float(scores[scores >= 0].quantile(quantile))
    found = select(query, key, value, config.replace(threshold=threshold), **options)
    expected = above(found.scores, threshold, [37 - padding, 37], 37, 5)
    assert [[head.tolist() for head in row] for row in found.positions] == expected
    if quantile == 0.5:
        assert any(len(head) > 5 for row in expected for head in row) and any(len(head) < 37 for head in expected[1])


def test_the_scores_are_those_of_the_replay():
    replay = torch.rand(1, 2, 37, generator=torch.Generator().manual_seed(1))
    replay[0, 0, :3] = torch.tensor([0.25, 0.25000003, 0.24999999])
    config = MixKVConfig(score="replay", budget="auto", threshold=0.25, window=5)
    query, key, value = draw(1, 4, 37, 6), draw(1, 2, 37, 6), draw(1, 2, 37, 6)
    (found,) = select(query, key, value, config, measured=Measured(replay)).positions
    assert 0 not in found[0] and 1 in found[0] and 2 not in found[0], "a score that equals the threshold does not exceed it"
    assert [head.tolist() for head in found] == above(replay, 0.25, [37], 37, 5)[0]


def test_a_score_of_the_users(monkeypatch):
    monkeypatch.setattr(registry, "SCORES", dict(registry.SCORES))
    mixkv.register_score("even", lambda context: 1.0 - context.key[:, :, : context.num_candidates, 0].float(), comparable=True)
    key = torch.zeros(1, 2, 12, 4)
    key[0, :, ::2, 0] = 1.0
    config = MixKVConfig(score="even", budget="auto", threshold=0.5, window=2)
    found = select(draw(1, 2, 12, 4), key, draw(1, 2, 12, 4), config)
    assert [head.tolist() for head in found.positions[0]] == [[1, 3, 5, 7, 9, 10, 11]] * 2
