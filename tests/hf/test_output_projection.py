"""Importance by what a row adds to the output, against arithmetic one row at a time."""

import pytest
import torch
from support import zoo
from torch import nn

import mixkv
from mixkv import MixKVConfig, select
from mixkv.hf.output_projection import factor, output_factor, output_scale, projected_output
from mixkv.hf.versions import cache_argument
from mixkv.selection.select import rank


def attention_module(query_heads, heads, size, hidden, dtype=torch.float32):
    module = nn.Module()
    module.num_key_value_groups = query_heads // heads
    module.o_proj = nn.Linear(query_heads * size, hidden, bias=False, dtype=dtype)
    return module


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
@pytest.mark.parametrize("heads, groups, size, hidden", [(2, 1, 64, 96), (3, 3, 16, 144), (1, 8, 32, 20), (2, 2, 8, 3)])
def test_gram_norm_equals_direct_norm(dtype, tolerance, heads, groups, size, hidden):
    torch.manual_seed(1)
    module = attention_module(heads * groups, heads, size, hidden, dtype)
    found = output_factor(module, heads, size)
    assert found.shape == (heads, size, size) and torch.equal(found, found.triu())
    weight = module.o_proj.weight.detach().double()
    for head in range(heads):
        value = torch.randn(7, size, dtype=torch.float64)
        squares = torch.zeros(7, dtype=torch.float64)
        for group in range(groups):
            start = (head * groups + group) * size
            squares += (value @ weight[:, start : start + size].T).square().sum(-1) / groups
        norm = (value @ found[head].double().T).norm(dim=-1)
        torch.testing.assert_close(norm, squares.sqrt(), rtol=tolerance, atol=1e-5)


def test_factor_is_made_once_and_again_when_the_weight_changes():
    module = attention_module(4, 2, 16, 40)
    first = output_factor(module, 2, 16)
    assert output_factor(module, 2, 16) is first
    with torch.no_grad():
        module.o_proj.weight.mul_(2)
    torch.testing.assert_close(output_factor(module, 2, 16), 2 * first)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_norms_behind_the_projection(name):
    """What a row adds, through the model's own norm, against factor times scale."""
    model = zoo.build(name, "eager")
    mixkv.MixKVCache(model)
    layer = model.get_decoder().layers[0]
    attention, norm = layer.self_attn, layer.post_attention_layernorm
    torch.nn.init.normal_(norm.weight, std=0.5)
    size = attention.head_dim
    heads = attention.k_proj.out_features // size
    groups = attention.num_key_value_groups
    found = output_factor(attention, heads, size)
    torch.manual_seed(4)
    output = torch.randn(2, 5, heads * groups, size)
    with torch.no_grad():
        added = attention.o_proj(output.flatten(2))
        scale = output_scale(projected_output(attention, output))
        torch.testing.assert_close(scale, (1 / added.square().mean(-1).sqrt()).mean(-1))
        for head in range(heads):
            row = torch.randn(size)
            squares = 0.0
            for group in range(groups):
                alone = torch.zeros(heads * groups, size)
                alone[head * groups + group] = row
                projected = attention.o_proj(alone.flatten())
                # The norm's gain, with its division by the root mean square taken back.
                squares += (norm(projected) * projected.square().mean().sqrt()).norm() ** 2 / groups
            torch.testing.assert_close((found[head] @ row).norm() ** 2, squares, rtol=1e-3, atol=1e-6)


def test_models_without_such_norms_have_no_scale():
    model = zoo.build("llama", "sdpa")
    mixkv.MixKVCache(model)
    attention = model.get_decoder().layers[0].self_attn
    size = attention.head_dim
    assert projected_output(attention, torch.randn(1, 3, attention.q_proj.out_features // size, size)) is None


def test_projections_that_cannot_be_read():
    module = attention_module(4, 2, 16, 40)
    assert output_factor(module, 3, 16) is None
    module.o_proj.weight = nn.Parameter(torch.zeros(40, 64, dtype=torch.uint8), requires_grad=False)
    assert output_factor(module, 2, 16) is None
    del module.o_proj
    assert output_factor(module, 2, 16) is None
    assert torch.isfinite(factor(torch.zeros(40, 64), 2, 16)).all()


@pytest.mark.parametrize("with_factor", [True, False])
def test_output_importance_one_row_at_a_time(with_factor):
    torch.manual_seed(2)
    heads, groups, size, length, window = 2, 3, 16, 30, 5
    query, key = torch.randn(1, heads * groups, window, size), torch.randn(1, heads, length, size)
    value, found = torch.randn(1, heads, length, size), torch.randn(heads, size, size).triu()
    config = MixKVConfig(method="adakv", score="output", budget=12, window=window)
    got = rank(query, key, value, config, output_factor=found if with_factor else None).importance
    candidates = length - window
    raw = torch.zeros(heads, candidates, dtype=torch.float64)
    for head in range(heads):
        for token in range(candidates):
            norm = (
                (found[head].double() @ value[0, head, token].double()).norm() if with_factor else value[0, head, token].norm()
            )
            for group in range(groups):
                total = 0.0
                for position in range(window):
                    q = query[0, head * groups + group, position].double()
                    logits = key[0, head, : candidates + position + 1].double() @ q * size**-0.5
                    total += float(logits.softmax(-1)[token]) ** 2
                raw[head, token] += (total / window) ** 0.5 * float(norm) / groups
    for head in range(heads):
        for token in range(candidates):
            expected = raw[head, max(0, token - 4) : token + 5].max()
            assert abs(float(got[0, head, token]) - float(expected)) < 1e-5


def test_mix_output_mixes_diversity_in():
    torch.manual_seed(3)
    query, key, value = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 60, 16) + 1, torch.randn(1, 2, 60, 16)
    config = MixKVConfig(method="snapkv", score="mix-output", budget=20, window=8)
    diverse = select(query, key, value, config, redundancy=torch.ones(2))
    keydiff = select(query, key, value, config.replace(score="keydiff"))
    assert torch.equal(diverse.flat_positions, keydiff.flat_positions)
    important = select(query, key, value, config, redundancy=torch.zeros(2))
    assert not torch.equal(important.flat_positions, diverse.flat_positions)


def test_stats_tell_what_rows_were_weighed_by():
    model = zoo.build("llama", "sdpa")
    for layer in list(model.get_decoder().layers)[1:2]:
        layer.self_attn.projection = layer.self_attn.o_proj
        layer.self_attn.o_proj = nn.Sequential(layer.self_attn.projection)
    prompts = zoo.inputs("llama", 60)
    cache = mixkv.MixKVCache(model, method="adakv", score="mix-output", budget=14, window=6)
    model.generate(**prompts, past_key_values=cache, max_new_tokens=2)
    norms = cache.stats()["output_norm"]
    assert norms[:2] == ["projection", "value"]
    cache = mixkv.MixKVCache(model, method="adakv", score="mix", budget=14, window=6)
    model.generate(**prompts, past_key_values=cache, max_new_tokens=2)
    assert set(cache.stats()["output_norm"]) == {None}


def quantised(model, layers):
    for index in layers:
        attention = model.get_decoder().layers[index].self_attn
        attention.o_proj = QuantisedLinear(attention.o_proj)
    return model


class QuantisedLinear(nn.Module):
    """A projection of int8 weights."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max().detach() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden):
        return hidden @ (self.weight.to(hidden.dtype) * self.scale).T


@pytest.mark.parametrize("method, score", [("adakv", "mix-output"), ("global", "mix"), ("snapkv", "output")])
def test_a_projection_that_cannot_be_read_is_named_once_a_model(method, score):
    options = dict(method=method, score=score, budget=14, window=6)
    for model in (quantised(zoo.build("llama"), [1, 2]), quantised(zoo.build("llama"), [0])):
        with pytest.warns(UserWarning, match=r"QuantisedLinear with torch.int8 weights.*rank tokens by the norm") as caught:
            for _ in range(2):
                cache = mixkv.MixKVCache(model, **options)
                with torch.no_grad():
                    model(**zoo.inputs("llama", 40), **cache_argument(cache))
        assert len([warning for warning in caught if "QuantisedLinear" in str(warning.message)]) == 1
    assert cache.stats()["output_norm"] == ["value", "projection", "projection"]


def test_nothing_is_said_where_projections_are_not_used(recwarn):
    model = quantised(zoo.build("llama"), [0, 1, 2])
    cache = mixkv.MixKVCache(model, method="adakv", score="mix", budget=14, window=6)
    with torch.no_grad():
        model(**zoo.inputs("llama", 40), **cache_argument(cache))
    mixkv.MixKVCache(zoo.build("llama"))
    assert not [warning for warning in recwarn if "projection" in str(warning.message)]
