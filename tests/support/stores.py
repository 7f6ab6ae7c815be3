"""Ragged stores for the tests of operations: NaN around every sequence, loops in float64 as oracles."""

import itertools
import warnings

import pytest
import torch

from mixkv.ops import native
from mixkv.ops.arguments import Packed, RaggedBuffers
from mixkv.ops.row_codes import dequantised, packed, quantised

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
    return RaggedBuffers(key, value, position, *ints)


def coded(store):
    """The same rows in int8, with NaN scales and codes of 127 wherever no sequence has a row."""
    key, key_scale = quantised(store.key.nan_to_num(0.0))
    value, value_scale = quantised(store.value.nan_to_num(0.0))
    nobody = store.position < 0
    for codes, scale in ((key, key_scale), (value, value_scale)):
        codes[nobody], scale[nobody] = 127, float("nan")
    return store._replace(key=key, value=value, key_scale=key_scale, value_scale=value_scale)


def packed_of(lengths, size, value_size):
    """Random rows in 4 bits, with NaN scales wherever no sequence has a row."""
    store = make_store(lengths, size, value_size, torch.float32)
    key, key_scale = packed(store.key.nan_to_num(0.0))
    value, value_scale = packed(store.value.nan_to_num(0.0))
    for scale in (key_scale, value_scale):
        scale[store.position < 0] = float("nan")
    buffers = store._replace(key=key, value=value, key_scale=key_scale, value_scale=value_scale)
    return Packed(buffers, max(lengths))


def decoded(store, packed=None):
    """The rows of `coded` stores in float32, as they are read, after those of ``packed``."""
    key, value = dequantised(store.key, store.key_scale), dequantised(store.value, store.value_scale)
    own = RaggedBuffers(key, value, store.position, store.starts, store.lengths)
    if packed is None:
        return own
    first, sequences = decoded(packed.buffers), range(store.lengths.numel())
    rows = {
        name: torch.cat([part for index in sequences for part in (rows_of(first, name, index), rows_of(own, name, index))])
        for name in ("key", "value", "position")
    }
    lengths = first.lengths + own.lengths
    return RaggedBuffers(**rows, starts=(lengths.cumsum(0) - lengths).int(), lengths=lengths)


def rows_of(store, name, index):
    """Rows of sequence ``index`` in the buffer ``name``."""
    start = int(store.starts[index])
    return getattr(store, name)[start : start + int(store.lengths[index])]


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


def oracle_attend(query, store, scaling, softcap=None, sinks=None):
    batch, query_heads = query.shape[:2]
    heads = store.starts.numel() // batch
    out = torch.empty(batch, 1, query_heads, store.value.shape[1], dtype=torch.float64)
    for b, q in itertools.product(range(batch), range(query_heads)):
        index = b * heads + q // (query_heads // heads)
        rows = [rows_of(store, name, index) for name in ("key", "value")]
        out[b, 0, q] = one_query(query[b, q, 0], *rows, scaling, softcap, None if sinks is None else sinks[q])
    return out


def oracle_extend(query, store, key, value, mask, scaling, softcap=None, sinks=None):
    batch, query_heads, new, _ = query.shape
    heads = key.shape[1]
    out = torch.empty(batch, new, query_heads, value.shape[-1], dtype=torch.float64)
    for b, q, i in itertools.product(range(batch), range(query_heads), range(new)):
        head = q // (query_heads // heads)
        seen = torch.arange(new) <= i if mask is None else mask[b if mask.shape[0] > 1 else 0, 0, i]
        rows = [
            torch.cat([rows_of(store, name, b * heads + head), part[b, head][seen]])
            for name, part in (("key", key), ("value", value))
        ]
        out[b, i, q] = one_query(query[b, q, i], *rows, scaling, softcap, None if sinks is None else sinks[q])
    return out


def query_rounding(query, store, scaling):
    """What an output over rows of codes may be off by, as queries are rounded to 16 bits: a logit by half a step of the query's
    elements times the sum of the key's, a mean of values by twice that times the largest value."""
    logit = scaling * (query.abs().max() / 32767 / 2 * store.key.float().abs().sum(dim=-1).max()).item()
    return 2 * logit * store.value.float().abs().max().item()


def assert_close(result, exact, twin=None, extra=0.0):
    """No worse than three times what plain torch loses in the same precision, a rounding of the result, and ``extra``."""
    assert not result.isnan().any()
    allowed = ROUNDING[result.dtype] * max(1.0, exact.abs().max().item()) * 1.5 + extra
    if twin is not None:
        allowed += 3 * (twin.double() - exact).abs().max().item()
    assert (result.double() - exact).abs().max().item() <= allowed


def clean(store):
    """The same storage for the twin, which reads rows it masks."""
    return type(store)(
        *(part.nan_to_num(0.0) if torch.is_tensor(part) and part.is_floating_point() else part for part in store)
    )


def copied(store):
    """A store in memory of its own."""
    return type(store)(*(part if part is None else part.clone() for part in store))


def assert_same_buffers(store, other):
    for part, twin in zip(store, other, strict=True):
        if part is None and twin is None:
            continue
        torch.testing.assert_close(part, twin, rtol=0, atol=0, equal_nan=True)


def strided(batch, heads, rows, size, dtype):
    """[B, heads, rows, size] as a projection leaves it: heads side by side in a wider row."""
    return torch.randn(batch, rows, heads, size + 16).to(dtype)[..., :size].transpose(1, 2)


UNEVEN = [0, 1, 700, 3, 129, 128, 17, 16]
