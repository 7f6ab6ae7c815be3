"""RaggedStore and the plain-torch operations against Python lists of rows and a loop over sequences in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkv.ops import reference
from mixkv.ops.arguments import LogitOptions
from mixkv.selection.ranking import Selection
from mixkv.storage.ragged import RaggedStore


def rows_of(batch, heads, length, size, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, length, size, generator=generator).to(dtype)


def selection_of(lengths, length, seed=0):
    """Random ascending positions of the given [B, Hkv] lengths."""
    generator = torch.Generator().manual_seed(seed)
    flat = [torch.randperm(length, generator=generator)[:n].sort().values for row in lengths for n in row]
    ranks = [torch.randperm(n, generator=generator) - min(2, n) for row in lengths for n in row]
    return Selection(
        torch.cat(flat).to(torch.int32),
        torch.cat(ranks).clamp(min=-1).to(torch.int32),
        torch.tensor(lengths),
        torch.zeros(1),
        torch.zeros(1),
    )


class Lists:
    """The same store as lists of (column, key, value) per sequence: slow, obviously right."""

    def __init__(self, key, value, selection):
        self.heads = key.shape[1]
        self.rows = [
            [[(int(p), key[b, h, p], value[b, h, p]) for p in positions] for h, positions in enumerate(row)]
            for b, row in enumerate(selection.positions)
        ]

    def append(self, key, value, column, valid=None):
        for b, row in enumerate(self.rows):
            for h, sequence in enumerate(row):
                for i in range(key.shape[2]):
                    if valid is None or valid[b, i]:
                        sequence.append((column + i, key[b, h, i], value[b, h, i]))

    def crop(self, count):
        self.rows = [[sequence[: len(sequence) - count] for sequence in row] for row in self.rows]

    def evict(self, ranks, quota, tail):
        """ranks: a list for each sequence, of its rows that came with the selection."""
        self.rows = [
            [
                [row for row, rank in zip(sequence, ranks[b][h]) if rank < quota[b][h]] + sequence[len(sequence) - tail :]
                for h, sequence in enumerate(heads)
            ]
            for b, heads in enumerate(self.rows)
        ]

    def take_rows(self, rows):
        self.rows = [[list(sequence) for sequence in self.rows[row]] for row in rows]


def assert_same(store, lists):
    assert store.batch == len(lists.rows)
    assert store.row_totals == [sum(map(len, row)) for row in lists.rows]
    assert store.max_length >= max(len(sequence) for row in lists.rows for sequence in row)
    positions = store.positions()
    for b, row in enumerate(lists.rows):
        for h, sequence in enumerate(row):
            index = b * store.heads + h
            start, length = int(store.buffers.starts[index]), int(store.lengths[index])
            assert positions[b][h].tolist() == [column for column, _, _ in sequence]
            for offset, (_, key, value) in enumerate(sequence):
                assert torch.equal(store.key[start + offset], key)
                assert torch.equal(store.value[start + offset], value)
            assert length == len(sequence)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 40)),
        st.tuples(st.just("masked"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.integers(0, 40)),
        st.tuples(st.just("rows"), st.integers(0, 1000)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), operations, st.integers(0, 999))
def test_store_behaves_as_lists_of_rows(batch, heads, even, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    key, value = rows_of(batch, heads, 30, 8, seed), rows_of(batch, heads, 30, 6, seed + 1)
    lengths = torch.randint(1, 31, (batch, heads), generator=generator)
    lengths = torch.full_like(lengths, 12) if even else lengths
    selection = selection_of(lengths.tolist(), 30, seed)
    store, lists = RaggedStore.from_selection(key, value, selection), Lists(key, value, selection)
    assert_same(store, lists)
    column = 30
    for name, amount in steps:
        if name in ("append", "masked"):
            new_key = rows_of(store.batch, heads, amount, 8, column)
            new_value = rows_of(store.batch, heads, amount, 6, column + 1)
            valid = None if name == "append" else torch.rand(store.batch, amount, generator=generator) > 0.4
            store.append(new_key, new_value, column, valid)
            lists.append(new_key, new_value, column, valid)
            column += amount
        elif name == "crop":
            amount = min(amount, store.tail)
            store.crop(amount)
            lists.crop(amount)
        else:
            rows = torch.randint(0, store.batch, (1 + amount % 4,), generator=generator).tolist()
            store.take_rows(rows)
            lists.take_rows(rows)
        assert_same(store, lists)
        query = rows_of(store.batch, heads * 2, 1, 8, column)
        expected = naive(query, lists, None, None, scaling=0.3)
        assert torch.allclose(store.attend(query, LogitOptions(0.3)).double(), expected, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 20), st.integers(0, 999))
def test_evict_behaves_as_lists_of_rows(batch, heads, appended, seed):
    generator = torch.Generator().manual_seed(seed)
    key, value = rows_of(batch, heads, 30, 8, seed), rows_of(batch, heads, 30, 6, seed + 1)
    lengths = torch.randint(1, 31, (batch, heads), generator=generator)
    selection = selection_of(lengths.tolist(), 30, seed)
    store, lists = RaggedStore.from_selection(key, value, selection), Lists(key, value, selection)
    if appended:
        new = rows_of(batch, heads, appended, 8, 5), rows_of(batch, heads, appended, 6, 6)
        store.append(*new, 30)
        lists.append(*new, 30)
    ranks = selection.flat_ranks
    for _ in range(3):
        quota = torch.randint(0, 31, (batch, heads), generator=generator)
        parts = iter(ranks.split((store.lengths.long() - appended).tolist()))
        by_head = [[next(parts).tolist() for _ in range(heads)] for _ in range(batch)]
        ranks = store.evict(ranks, quota.flatten())
        lists.evict(by_head, quota.tolist(), appended)
        assert_same(store, lists)
        assert ranks.tolist() == [r for b, row in enumerate(by_head) for h, of in enumerate(row) for r in of if r < quota[b, h]]
    store.crop(appended)
    lists.crop(appended)
    assert_same(store, lists)


def naive(query, lists, new_key, new_value, *, scaling, mask=None, softcap=None, sinks=None):
    """Attention one query at a time in float64: [B, n, Hq, Dv]."""
    batch, query_heads, new, _ = query.shape
    groups = query_heads // lists.heads
    out = None
    for b in range(batch):
        for h in range(query_heads):
            stored = lists.rows[b][h // groups]
            for i in range(new):
                keys, values = [row[1] for row in stored], [row[2] for row in stored]
                if new_key is not None:
                    for j in range(new):
                        if mask[b if mask.shape[0] > 1 else 0, 0, i, j] if mask is not None else j <= i:
                            keys.append(new_key[b, h // groups, j])
                            values.append(new_value[b, h // groups, j])
                k, v = torch.stack(keys).double(), torch.stack(values).double()
                logits = (k @ query[b, h, i].double()) * scaling
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h].double().view(1)])
                out = torch.zeros(batch, new, query_heads, v.shape[-1], dtype=torch.float64) if out is None else out
                out[b, i, h] = logits.softmax(-1)[: len(keys)] @ v
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("groups", [1, 3, 7])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sinks": True}], ids=["plain", "softcap", "sinks"])
def test_attend_and_extend(dtype, size, groups, options):
    heads, batch, new = 2, 2, 3
    key, value = rows_of(batch, heads, 50, size, 1, dtype), rows_of(batch, heads, 50, size, 2, dtype)
    selection = selection_of([[1, 40], [17, 3]], 50)
    store, lists = RaggedStore.from_selection(key, value, selection), Lists(key, value, selection)
    options = {**options, "sinks": torch.randn(heads * groups).to(dtype)} if "sinks" in options else options
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    query = rows_of(batch, heads * groups, 1, size, 3, dtype)
    got = store.attend(query, LogitOptions(size**-0.5, **options))
    assert got.dtype == dtype
    assert (got.double() - naive(query, lists, None, None, scaling=size**-0.5, **options)).abs().max() < tolerance
    query = rows_of(batch, heads * groups, new, size, 4, dtype)
    new_key, new_value = rows_of(batch, heads, new, size, 5, dtype), rows_of(batch, heads, new, size, 6, dtype)
    mask = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[0, 0, 0], [0, 1, 0], [0, 1, 1]]]).bool().unsqueeze(1)
    for block in (None, mask):
        got = store.attend_extend(query, new_key, new_value, LogitOptions(size**-0.5, **options), mask=block)
        expected = naive(query, lists, new_key, new_value, scaling=size**-0.5, mask=block, **options)
        assert (got.double() - expected).abs().max() < tolerance


def test_extend_in_blocks(monkeypatch):
    monkeypatch.setattr(reference, "_EXTEND_BLOCK", 4)
    key, value = rows_of(1, 2, 20, 8, 1), rows_of(1, 2, 20, 8, 2)
    selection = selection_of([[5, 9]], 20)
    store, lists = RaggedStore.from_selection(key, value, selection), Lists(key, value, selection)
    query, new_key, new_value = rows_of(1, 4, 11, 8, 3), rows_of(1, 2, 11, 8, 4), rows_of(1, 2, 11, 8, 5)
    got = store.attend_extend(query, new_key, new_value, LogitOptions(0.3))
    assert torch.allclose(got.double(), naive(query, lists, new_key, new_value, scaling=0.3), atol=1e-6)


def test_append_is_in_place_and_growth_is_amortised():
    store = RaggedStore.from_selection(rows_of(1, 2, 200, 8), rows_of(1, 2, 200, 8), selection_of([[160, 40]], 200))
    layouts, buffers = 0, store.key.data_ptr()
    for step in range(400):
        store.append(rows_of(1, 2, 1, 8), rows_of(1, 2, 1, 8), 200 + step)
        layouts += store.key.data_ptr() != buffers
        buffers = store.key.data_ptr()
        assert store.key.shape[0] <= store.total + 2 * max(16, store.total / 16)
    assert layouts <= 400 / 16


def test_padded_is_aligned_to_the_right():
    key, value = rows_of(2, 2, 20, 8, 1), rows_of(2, 2, 20, 4, 2)
    selection = selection_of([[5, 9], [1, 20]], 20)
    store = RaggedStore.from_selection(key, value, selection)
    padded_key, padded_value, valid = store.padded()
    for b in range(2):
        for h in range(2):
            positions = selection.positions[b][h].long()
            assert valid[b, h].tolist() == [False] * (20 - len(positions)) + [True] * len(positions)
            assert torch.equal(padded_key[b, h, valid[b, h]], key[b, h, positions])
            assert torch.equal(padded_value[b, h, valid[b, h]], value[b, h, positions])


def test_stores_hold_no_view_of_the_prompt():
    key = rows_of(1, 2, 4000, 8)
    store = RaggedStore.from_selection(key, key, selection_of([[30, 10]], 4000))
    assert store.nbytes < 2 * (40 + 2 * 16) * (8 * 4 + 4)
