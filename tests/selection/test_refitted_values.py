"""Refitted values and attention's outputs against one head after the other in float64."""

import pytest
import torch
from support import oracle

from mixkv.ops.arguments import LogitOptions
from mixkv.selection.refit import FOLDS, Reference, attention_output, refit


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def options(kind, query_heads):
    sinks = draw(query_heads, seed=9) if kind == "sinks" else None
    softcap = 2.0 if kind == "softcap" else None
    return LogitOptions(0.4, softcap, sinks), {"scaling": 0.4, "softcap": softcap, "s_aux": sinks}


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_sets_of_queries(kind, dtype):
    batch, heads, groups, rows, size, value_size = 2, 2, 3, 23, 8, 5
    logits, kwargs = options(kind, heads * groups)
    key, value = draw(batch, heads, rows, size, seed=0).to(dtype), draw(batch, heads, rows, value_size, seed=1).to(dtype)
    position = draw(batch, heads, rows, seed=2).argsort(dim=-1).sort(dim=-1).values.int() * 3
    held = torch.ones(batch, heads, rows, dtype=torch.bool)
    held[0, 1, :7] = False
    # Of the first set some queries see part of the rows, and the first of batch row 0 are padding; of the second all see all.
    valid = torch.ones(batch, 6, dtype=torch.bool)
    valid[0, :2] = False
    sets = [
        Reference(draw(batch, heads * groups, 6, size, seed=3), draw(batch, 6, heads * groups, value_size, seed=4), 60, valid),
        Reference(draw(batch, heads * groups, 9, size, seed=5), 0.3 * draw(batch, 9, heads * groups, value_size, seed=6)),
    ]
    fitted = refit(sets, key, value, position, held, logits)
    assert fitted.dtype == dtype
    changed = 0
    for row in range(batch):
        for head in range(heads):
            mine = held[row, head]
            own = key[row, head, mine], value[row, head, mine], position[row, head, mine]
            expected = plain(sets, row, head, groups, *own, kwargs)
            close = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
            assert (fitted[row, head, mine] - expected).abs().max() <= close * expected.abs().max()
            changed += not torch.equal(fitted[row, head], value[row, head])
    assert changed


def plain(sets, row, head, groups, key, value, position, kwargs):
    given, output, folds = [], [], []
    for each in sets:
        tokens = each.query.shape[2]
        real = [True] * tokens if each.valid is None else each.valid[row].tolist()
        for token in range(tokens):
            for of_head in range(head * groups, (head + 1) * groups):
                if not real[token]:
                    continue
                seen = slice(None) if each.first is None else position <= each.first + token
                weight = torch.zeros(key.shape[0], dtype=torch.float64)
                weight[seen] = oracle.weights(each.query[row, of_head, token], key[seen], of_head, kwargs)
                given.append(weight / sum(real) ** 0.5)
                output.append(each.output[row, token, of_head].double() / sum(real) ** 0.5)
                folds.append(token // -(-tokens // FOLDS))
    return oracle.refit_head(torch.stack(given), torch.stack(output), value.double(), torch.tensor(folds))


def test_exact_on_queries_that_rows_can_serve():
    key, value = draw(1, 1, 30, 8, seed=0), draw(1, 1, 30, 8, seed=1)
    true, query, logits = draw(1, 1, 30, 8, seed=2), draw(1, 2, 200, 8, seed=3), LogitOptions(1.0)
    output = ((query @ key.transpose(-1, -2)).softmax(-1) @ true).transpose(1, 2)
    position, held = torch.arange(30).view(1, 1, -1), torch.ones(1, 1, 30, dtype=torch.bool)
    fitted = refit([Reference(query, output)], key, value, position, held, logits)
    before, after = ((query @ key.transpose(-1, -2)).softmax(-1) @ (part - true) for part in (value, fitted))
    assert after.square().sum() < 1e-3 * before.square().sum()


def test_values_stay_where_no_ridge_helps():
    key, value, query = draw(1, 1, 12, 8, seed=0), draw(1, 1, 12, 8, seed=1), torch.zeros(1, 1, 8, 8)
    # All queries get the mean value. What is missing has one sign in half of the folds and the other in the rest: in a held-out
    # fold the fit to the others is wrong.
    missing = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0]).view(1, -1, 1, 1)
    output = value.mean(dim=2).view(1, 1, 1, 8) + missing
    position, held = torch.arange(12).view(1, 1, -1), torch.ones(1, 1, 12, dtype=torch.bool)
    assert torch.equal(refit([Reference(query, output)], key, value, position, held, LogitOptions(1.0)), value)


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
def test_attention_output(kind):
    logits, kwargs = options(kind, 6)
    query, key, value = draw(2, 6, 5, 8, seed=0), draw(2, 2, 17, 8, seed=1), draw(2, 2, 17, 3, seed=2)
    valid = torch.ones(2, 17, dtype=torch.bool)
    valid[0, :6] = False
    found = attention_output(query, key, value, valid, logits)
    for row in range(2):
        for head in range(6):
            for token in range(5):
                seen = valid[row] & (torch.arange(17) <= 12 + token)
                weights = oracle.weights(query[row, head, token], key[row, head // 3, seen], head, kwargs)
                assert torch.allclose(
                    found[row, token, head].double(), weights @ value[row, head // 3, seen].double(), atol=1e-5
                )
