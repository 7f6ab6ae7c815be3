"""Ragged stores for the tests of operations: NaN around every sequence, loops in float64 as oracles."""

import itertools
import warnings

import pytest
import torch

from mixkv.ops import native

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    STATUS = native.status("cpu")
needs_library = pytest.mark.skipif(not STATUS.available, reason=f"no compiled operations: {STATUS.reason}")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Half a unit in the last place of results around 1.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
GUARD = 3


def make_store(lengths, size, value_size, dtype, spare=2, poison=True):
    """Flat buffers with NaN wherever no sequence has a row, and GUARD unowned rows around every sequence."""
    starts, row = [], GUARD
    for length in lengths:
        starts.append(row)
        row += length + spare + GUARD
    fill = float("nan") if poison else 0.0
    key, value = torch.full((row, size), fill, dtype=dtype), torch.full((row, value_size), fill, dtype=dtype)
    position = torch.full((row,), -1, dtype=torch.int32)
    for start, length in zip(starts, lengths, strict=True):
        key[start : start + length] = torch.randn(length, size).to(dtype)
        value[start : start + length] = torch.randn(length, value_size).to(dtype)
        position[start : start + length] = torch.arange(length, dtype=torch.int32)
    ints = (torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32))
    return (key, value, position), *ints


def rows_of(buffer, starts, lengths, index):
    start = int(starts[index])
    return buffer[start : start + int(lengths[index])]


def softmax_row(logits, sink):
    """Weights in float64; a sink takes mass and holds no row."""
    if sink is not None:
        logits = torch.cat([logits, sink.double().view(1)])
    weights = logits.softmax(dim=-1)
    return weights if sink is None else weights[:-1]


def one_query(query, key, value, scaling, softcap, sink):
    if key.shape[0] == 0:
        return torch.zeros(value.shape[1], dtype=torch.float64)
    logits = key.double() @ query.double() * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return softmax_row(logits, sink) @ value.double()


def oracle_attend(query, buffers, starts, lengths, scaling, softcap=None, sinks=None):
    batch, query_heads = query.shape[:2]
    heads = starts.numel() // batch
    out = torch.empty(batch, 1, query_heads, buffers[1].shape[1], dtype=torch.float64)
    for b, q in itertools.product(range(batch), range(query_heads)):
        index = b * heads + q // (query_heads // heads)
        rows = [rows_of(buffer, starts, lengths, index) for buffer in buffers[:2]]
        out[b, 0, q] = one_query(query[b, q, 0], *rows, scaling, softcap, None if sinks is None else sinks[q])
    return out


def oracle_extend(query, buffers, starts, lengths, key, value, mask, scaling, softcap=None, sinks=None):
    batch, query_heads, new, _ = query.shape
    heads = key.shape[1]
    out = torch.empty(batch, new, query_heads, value.shape[-1], dtype=torch.float64)
    for b, q, i in itertools.product(range(batch), range(query_heads), range(new)):
        head = q // (query_heads // heads)
        seen = torch.arange(new) <= i if mask is None else mask[b if mask.shape[0] > 1 else 0, 0, i]
        rows = [
            torch.cat([rows_of(buffer, starts, lengths, b * heads + head), part[b, head][seen]])
            for buffer, part in zip(buffers[:2], (key, value), strict=True)
        ]
        out[b, i, q] = one_query(query[b, q, i], *rows, scaling, softcap, None if sinks is None else sinks[q])
    return out


def assert_close(result, exact, twin=None):
    """No worse than three times what plain torch loses in the same precision, and a rounding of the result."""
    assert not result.isnan().any()
    allowed = ROUNDING[result.dtype] * max(1.0, exact.abs().max().item()) * 1.5
    if twin is not None:
        allowed += 3 * (twin.double() - exact).abs().max().item()
    assert (result.double() - exact).abs().max().item() <= allowed


def clean(buffers):
    """The same storage for the twin, which reads rows it masks."""
    return [buffer.nan_to_num(0.0) if buffer.is_floating_point() else buffer for buffer in buffers]


def strided(batch, heads, rows, size, dtype):
    """[B, heads, rows, size] as a projection leaves it: heads side by side in a wider row."""
    return torch.randn(batch, rows, heads, size + 16).to(dtype)[..., :size].transpose(1, 2)


UNEVEN = [0, 1, 700, 3, 129, 128, 17, 16]
