"""What the attention function costs and asks for at a decode step."""

from collections import Counter

import pytest
import torch
import transformers
from support import zoo
from torch.utils._python_dispatch import TorchDispatchMode

import mixkv
from mixkv.hf.versions import cache_argument

# Operations whose result the host waits for.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_consecutive")


class Waits(TorchDispatchMode):
    """Counts the operations that read a device's numbers on the host."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] += name in WAITING
        return function(*args, **(kwargs or {}))


def waits_of_a_step(model, cache, padded, masked):
    prompts = zoo.ragged("llama", [48, 41])[0] if padded else zoo.inputs("llama", 48, batch=2)
    mask = torch.cat([prompts["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1) if masked else None
    with torch.no_grad():
        model(**prompts, **cache_argument(cache))
        with Waits() as waits:
            positions = torch.full((2, 1), 48)
            model(torch.tensor([[5], [6]]), attention_mask=mask, position_ids=positions, **cache_argument(cache))
    return sum(waits.counts.values())


@pytest.mark.parametrize("method", ["snapkv", "global"])
@pytest.mark.parametrize("padded, masked", [(False, False), (False, True), (True, True)], ids=["bare", "mask", "padded"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_decode_step_waits_for_no_device(attn, padded, masked, method):
    """Beyond what transformers itself reads of a mask: one number under sdpa."""
    model = zoo.build("llama", attn)
    own = waits_of_a_step(model, transformers.DynamicCache(config=model.config), padded, masked)
    ours = waits_of_a_step(model, mixkv.MixKVCache(model, method=method, budget=14, window=6), padded, masked)
    assert ours == own <= masked
    assert attn == "sdpa" or ours == 0


def test_the_counter_counts():
    with Waits() as waits:
        bool(torch.ones(3).all())
        torch.ones(3).nonzero()
    assert waits.counts["_local_scalar_dense"] == waits.counts["nonzero"] == 1


@pytest.mark.parametrize("new", [2, 5])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_turn_padded_on_the_right_is_refused(attn, new):
    model = zoo.build("llama", attn)
    prompts = zoo.inputs("llama", 40, batch=2)
    cache = mixkv.MixKVCache(model, budget=14, window=6)
    mask = torch.ones(2, 40 + new, dtype=torch.long)
    mask[1, -1] = 0
    with torch.no_grad():
        model(**prompts, **cache_argument(cache))
        with pytest.raises(ValueError, match=r"batch rows \[1\] are padded on the right"):
            model(torch.full((2, new), 7), attention_mask=mask, **cache_argument(cache))
    assert cache.get_seq_length() == 40
