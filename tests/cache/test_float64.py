"""Compression without float64 tensors, which some devices do not have, and without more waiting for the device than needed."""

import pytest
import torch
from support import oracle, zoo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mixkv
from mixkv import registry


class NoFloat64(TorchDispatchMode):
    """Makes every operation an error that takes or returns a float64 tensor, as on a device that has none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{function} on float64")
        return result


@pytest.mark.parametrize("score", ["mix", "mix-output"])
@pytest.mark.parametrize("method", registry.METHODS)
@pytest.mark.parametrize("budget", [24, 0.5])
def test_every_method_runs_without_float64(method, score, budget):
    model = zoo.build("llama", "sdpa")
    prompts, _ = zoo.ragged("llama", [60, 41])
    needs = registry.method(method)
    profile = [[1.0, 2.0]] * model.config.num_hidden_layers if needs.needs_profile else None
    bounded = {"decode_budget": 20, "decode_slack": 2} if needs.decode_budget else {}
    options = dict(
        method=method, score=score, budget=budget, window=6, profile=profile, hybrid_chunk=4, backend="torch", **bounded
    )
    # The factors of the output projections are made once a model, on the host where its device has no float64.
    tokens, _ = oracle.generate(model, prompts, 8, past_key_values=mixkv.MixKVCache(model, **options))
    with NoFloat64():
        again, _ = oracle.generate(model, prompts, 8, past_key_values=mixkv.MixKVCache(model, **options))
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(1, dtype=torch.float64)
    assert torch.equal(tokens, again)
