"""Attention of a replay against a loop over queries in double precision."""

import pytest
import torch

from mixkv.ops import replay_attention as module
from mixkv.ops.replay_attention import replay_attention


def naive(query, context_key, context_value, key, value, *, visible, scored, scaling, softcap, sinks):
    batch, query_heads, new, _ = query.shape
    heads, seen = context_key.shape[1:3]
    output = torch.zeros(batch, new, query_heads, value.shape[-1], dtype=torch.float64)
    score = torch.zeros(batch, heads, seen, dtype=torch.float64)
    for row in range(batch):
        for head in range(query_heads):
            own = head // (query_heads // heads)
            shown = torch.ones(seen, dtype=torch.bool) if visible is None else visible[row]
            for place in range(new):
                keys = torch.cat([context_key[row, own][shown], key[row, own, : place + 1]]).double()
                values = torch.cat([context_value[row, own][shown], value[row, own, : place + 1]]).double()
                logits = keys @ query[row, head, place].double() * scaling
                if softcap is not None:
                    logits = softcap * (logits / softcap).tanh()
                if sinks is not None:
                    logits = torch.cat([logits, sinks[head].double().view(1)])
                shares = logits.softmax(0)[: len(keys)]
                output[row, place, head] = shares @ values
                if scored is None or scored[row, place]:
                    score[row, own, shown] = score[row, own, shown].maximum(shares[: int(shown.sum())])
    return output, score


@pytest.mark.parametrize("heads, groups", [(1, 1), (2, 3)])
@pytest.mark.parametrize("seen, new", [(1, 1), (13, 7), (5, 20)])
@pytest.mark.parametrize("special", ["nothing", "masks", "softcap and sinks", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weights", [1, 60, 1 << 18])
def test_it_is_attention_and_the_largest_weights(heads, groups, seen, new, special, dtype, weights, monkeypatch):
    monkeypatch.setattr(module, "_CPU_WEIGHTS", weights)
    batch, masks, extras = 2, special in ("masks", "all"), special in ("softcap and sinks", "all")
    query = torch.randn(batch, heads * groups, new, 8, dtype=dtype)
    keys = [torch.randn(batch, heads, count, 8, dtype=dtype) for count in (seen, new)]
    values = [torch.randn(batch, heads, count, 6, dtype=dtype) for count in (seen, new)]
    options = {
        "visible": torch.rand(batch, seen) < 0.7 if masks else None,
        "scored": torch.rand(batch, new) < 0.7 if masks else None,
        "scaling": 0.5,
        "softcap": 2.0 if extras else None,
        "sinks": torch.randn(heads * groups) if extras else None,
    }
    arguments = (query, keys[0], values[0], keys[1], values[1])
    output, score = replay_attention(*arguments, **options)
    expected, highest = naive(*arguments, **options)
    assert output.dtype == dtype and score.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}[dtype]
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(score.double(), highest, atol=tolerance, rtol=tolerance)


def test_blocks_over_all_heads_give_the_same(monkeypatch):
    arguments = [torch.randn(2, 6, 9, 8), *(torch.randn(2, 3, count, 8) for count in (11, 11, 9, 9))]
    options = dict(scaling=0.3, visible=torch.rand(2, 11) < 0.7, scored=torch.rand(2, 9) < 0.7, sinks=torch.randn(6))
    expected = replay_attention(*arguments, **options)
    monkeypatch.setattr(module, "_HEAD_BY_HEAD", ())
    for weights in (1, 300, 1 << 20):
        monkeypatch.setattr(module, "_WEIGHTS", weights)
        for mine, theirs in zip(replay_attention(*arguments, **options), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
