"""score="gate" with a decode budget: what an answer evicts has the lowest predictions, row by row in float64."""

import pytest
import torch
from support import zoo

import mixkv
from mixkv.hf.versions import cache_argument

WINDOW, DECODE_BUDGET, SLACK, FIRST = 6, 18, 4, 4
ROUNDING = 1e-5


def prediction(key, value, gate, head):
    """The gate of KV head ``head`` for one row."""
    key, value, features = key.double(), value.double(), []
    for element, partner in enumerate(gate.partner.tolist()):
        if partner > element:
            features.append((key[element] ** 2 + key[partner] ** 2) ** 0.5)
        elif partner == element:
            features.append(key[element])
    features += [*value, value.norm().log(), key.norm(), torch.ones(()).double()]
    logarithm = sum(weight * feature for weight, feature in zip(gate.weight[head].double().tolist(), features, strict=True))
    return float((logarithm.exp() - 1e-5).clamp(0, 1))


def held(layer):
    """By batch row and head, position -> (key, value) of the rows held."""
    key, value, valid = layer.store.padded()
    positions = layer.store.padded_positions()
    return [
        [
            {
                int(positions[row, head, at]): (key[row, head, at], value[row, head, at])
                for at in valid[row, head].nonzero()[:, 0]
            }
            for head in range(key.shape[1])
        ]
        for row in range(key.shape[0])
    ]


def check(before, after, gate, head):
    """``after`` has the window and the best of the others of ``before``; returns how many were evicted."""
    at = sorted(before)
    candidates, window = at[:-WINDOW], at[-WINDOW:]
    scores = {place: 1.0 if index < FIRST else prediction(*before[place], gate, head) for index, place in enumerate(candidates)}
    assert set(window) <= set(after) <= set(before)
    kept = [score for place, score in scores.items() if place in after]
    evicted = [score for place, score in scores.items() if place not in after]
    assert not (kept and evicted) or min(kept) >= max(evicted) - ROUNDING
    return len(evicted)


@pytest.mark.parametrize("method, decay", [("snapkv", 0.0), ("snapkv", 0.5), ("adakv", 0.5), ("global", 0.0)])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_the_lowest_predictions_are_evicted(name, method, decay, tmp_path):
    model = zoo.build(name)
    path = mixkv.calibrate(model, [zoo.inputs(name, 60, seed=seed) for seed in range(3)], out=tmp_path / "gate.safetensors")
    options = dict(method=method, score="gate", gate=path, budget=14, window=WINDOW)
    cache = mixkv.MixKVCache(model, **options, decode_budget=DECODE_BUDGET, decode_slack=SLACK, decode_decay=decay)
    prompts = zoo.inputs(name, 50, batch=2, seed=9)
    model(**prompts, **cache_argument(cache))
    gates = cache._state.gate.layers
    layers = [layer for layer in cache.layers if hasattr(layer, "store")]
    evicted, generator = 0, torch.Generator().manual_seed(0)
    for step in range(30):
        before = [held(layer) for layer in layers]
        model(torch.randint(4, 100, (2, 1), generator=generator), **cache_argument(cache))
        for layer, rows, gate in zip(layers, before, gates, strict=True):
            for row, heads in enumerate(held(layer)):
                for head, after in enumerate(heads):
                    rows[row][head][50 + step] = after[50 + step]
                    evicted += check(rows[row][head], after, gate, head)
                total = sum(map(len, heads))
                most = (
                    DECODE_BUDGET + SLACK if method != "global" else max(DECODE_BUDGET * layer.share[row], WINDOW + 1) + SLACK
                )
                assert total <= len(heads) * (most + 1)
    assert evicted >= 50
