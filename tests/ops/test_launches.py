"""What a decode step in plain torch launches on a device: every operation that is no view is a kernel there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixkv.ops import dispatch, reference
from mixkv.ops.arguments import LogitOptions, RaggedBuffers
from mixkv.ops.layout import empty_buffers

# Append: the rows' places, key, value, position, the lengths. Attention over rows that lie evenly: itself.
EVEN = 6
# And where sequences differ: the rows' numbers, keys and values gathered, the mask and the bias that it becomes.
UNEVEN = 11
LOGITS = LogitOptions(0.2)


class Launches(TorchDispatchMode):
    """Names the operations that are no views and make no uninitialised memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(found.alias_info is not None and not found.alias_info.is_write for found in function._schema.returns)
        if not views and not any(word in str(function) for word in ("empty", "_unsafe_view")):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def make(lengths, spare=40):
    like = (torch.zeros(1, 32), torch.zeros(1, 32))
    store = empty_buffers(torch.tensor(lengths), sum(lengths), spare, like)
    for part in (store.key, store.value):
        part.normal_()
    return store


def step(store, longest, stride, index, **shapes):
    query, key, value = (torch.randn(2, heads, 1, size) for heads, size in ((6, 32), (2, 32), (2, 32)))
    with Launches() as launched:
        found = dispatch.append_attend("torch", query, store, key, value, index, LOGITS, max_length=longest, stride=stride)
    return query, found, launched.names


@pytest.mark.parametrize("lengths, most", [([50] * 4, EVEN), ([7, 50, 33, 1], UNEVEN)])
def test_launches_of_a_decode_step(lengths, most):
    store, even = make(lengths), len(set(lengths)) == 1
    stride = store.key.shape[0] // 4 if even else None
    for index in range(30):
        query, found, names = step(store, max(lengths) + index + 1, stride, index)
        # Where the sequences lie is found in the first step.
        assert index == 0 or len(names) <= most, " ".join(names)
        fresh = RaggedBuffers(*(None if part is None else part.clone() for part in store))
        assert torch.equal(found, reference.attend(query, fresh, LOGITS, max_length=max(lengths) + index + 1, stride=stride))
