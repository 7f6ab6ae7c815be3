"""apportion against the same arithmetic on tensors."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.selection.apportion import apportion, to_device, to_host


def apportion_tensors(shares, total, limit):
    room = limit.double()
    for _ in range(shares.shape[-1]):
        if not (shares > room).any():
            break
        open_heads = (shares < room).double()
        surplus = (shares - room).clamp(min=0).sum(-1, keepdim=True)
        weight = (shares + 1e-9) * open_heads
        shares = shares.minimum(room) + surplus * weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
    shares = shares.minimum(room)
    whole = (shares + 1e-6).floor().minimum(room)
    missing = total.double().unsqueeze(-1) - whole.sum(-1, keepdim=True)
    fraction = (shares - whole).masked_fill(whole >= room, -1.0)
    rank = fraction.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (whole + (rank < missing)).long()


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3), st.integers(1, 100), st.integers(1, 6), st.integers(1, 60), st.integers(0, 9999))
def test_apportion_equals_its_twin_on_tensors(rows, heads, steps, most, seed):
    """Shares in whole ``steps`` of a unit make ties."""
    generator = torch.Generator().manual_seed(seed)
    shares = (torch.rand(rows, heads, dtype=torch.float64, generator=generator) * 30 * steps).round() / steps
    limit = torch.randint(0, most, (rows, heads), generator=generator)
    total = shares.sum(-1).round().long().minimum(limit.sum(-1))
    got = apportion(shares.numpy(), total.numpy(), limit.numpy())
    assert np.array_equal(got, apportion_tensors(shares, total, limit).numpy())


def test_to_host_and_back():
    parts = [torch.tensor([3, 4]), torch.arange(6, dtype=torch.int32).view(2, 3).T, torch.zeros(0, 2, dtype=torch.long)]
    for part, array in zip(parts, to_host(*parts), strict=True):
        assert array.dtype == np.int64 and array.tolist() == part.tolist()
        assert torch.equal(to_device(array, part.device), part.long())
