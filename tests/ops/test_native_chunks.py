"""The compiled operations on chunks against their twins in plain torch and against loops in float64."""

import pytest
import torch
from support.stores import DTYPES, assert_close, clean, make_store, needs_library, one_query, rows_of, strided

from mixkv.ops import native, reference
from mixkv.ops.arguments import ChosenChunks, LogitOptions

THREADS = [1, 2]


@pytest.fixture(params=THREADS)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make_chunks(sequences, most, rows, chunk, size, value_size, dtype):
    """Chunks in buffers with NaN around them, up to ``most`` a sequence; some sequences choose fewer, or none."""
    key, value = torch.full((rows, size), torch.nan).to(dtype), torch.full((rows, value_size), torch.nan).to(dtype)
    blocks = torch.randint(-chunk, 2 * rows, (sequences, most), dtype=torch.int32)
    block_rows = torch.zeros(sequences, most, dtype=torch.int32)
    places = torch.randperm(rows // chunk)[: sequences * most].view(sequences, most) * chunk
    for s in range(sequences):
        for k in range(s % (most + 1)):
            count = int(torch.randint(1, chunk + 1, ()))
            blocks[s, k], block_rows[s, k] = places[s, k], count
            span = slice(int(places[s, k]), int(places[s, k]) + count)
            key[span], value[span] = torch.randn(count, size).to(dtype), torch.randn(count, value_size).to(dtype)
    return ChosenChunks(key, value, blocks, block_rows, chunk)


def oracle_chunks(query, store, chunks, scaling, softcap, sinks):
    batch, query_heads = query.shape[:2]
    heads = store.starts.numel() // batch
    out = torch.empty(batch, 1, query_heads, chunks.value.shape[1], dtype=torch.float64)
    for b in range(batch):
        for q in range(query_heads):
            s = b * heads + q // (query_heads // heads)
            spans = [slice(at, at + count) for at, count in zip(chunks.starts[s].tolist(), chunks.lengths[s].tolist()) if count]
            parts = [
                torch.cat([rows_of(store, name, s), *(getattr(chunks, name)[span] for span in spans)])
                for name in ("key", "value")
            ]
            out[b, 0, q] = one_query(query[b, q, 0], *parts, scaling, softcap, None if sinks is None else sinks[q])
    return out


@needs_library
@pytest.mark.parametrize("size, value_size, groups", [(16, 16, 1), (64, 64, 3), (80, 48, 2), (128, 128, 7), (256, 256, 5)])
@pytest.mark.parametrize("softcap, with_sinks, chunk", [(None, False, 8), (5.0, True, 32), (None, True, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_chunks_equals_oracle(dtype, softcap, with_sinks, chunk, size, value_size, groups, threads):
    torch.manual_seed(size + groups)
    lengths = [0, 1, 300, 3, 129, 128, 17, 0]
    store = make_store(lengths, size, value_size, dtype)
    chunks = make_chunks(8, 5, 2048, chunk, size, value_size, dtype)
    query = strided(2, 4 * groups, 1, size, dtype)
    sinks = torch.randn(4 * groups) if with_sinks else None
    logits = dict(scaling=size**-0.5, softcap=softcap, sinks=sinks)
    result = native.attend_chunks(query, store, chunks, LogitOptions(**logits), max_length=300)
    twin = reference.attend_chunks(query, clean(store), clean(chunks), LogitOptions(**logits), max_length=300)
    exact = oracle_chunks(query, store, chunks, *logits.values())
    twin.view(2, 4, groups, value_size)[0, 0] = 0.0  # the twin has no answer for a sequence without rows
    assert result.shape == exact.shape and result.dtype == dtype
    assert_close(result, exact, twin)


@needs_library
@pytest.mark.parametrize("size, groups", [(16, 1), (64, 3), (80, 4), (128, 7), (256, 9)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunk_scores_equal_their_twin(dtype, size, groups, threads):
    torch.manual_seed(size + groups)
    counts = torch.tensor([0, 1, 7, 400, 33, 2], dtype=torch.int32)
    starts = (counts.cumsum(0) - counts + 2).to(torch.int32)
    low, high = torch.randint(16, (2, int(counts.sum()) + 4, size), dtype=torch.uint8).sort(dim=0).values
    codes, grid = 16 * high + low, torch.rand(6, 2, size) - torch.tensor([[0.5], [0.0]])
    query = strided(2, 3 * groups, 1, size, dtype)
    found = native.chunk_scores(query, codes, grid, starts, counts, longest=401)
    twin = reference.chunk_scores(query, codes, grid, starts, counts, longest=401)
    assert torch.equal(found.isneginf(), twin.isneginf()) and found.isneginf()[:, 400].all()
    exact = torch.full_like(found, -torch.inf, dtype=torch.float64)
    for s in range(6):
        mine = query.reshape(6, groups, 1, size)[s].double()
        span, (lowest, step) = slice(int(starts[s]), int(starts[s] + counts[s])), grid[s].double()
        sides = [mine * (lowest + step * level[span].double()) for level in (high, low)]
        exact[s, : counts[s]] = torch.maximum(*sides).sum(-1).amax(0)
    real = ~found.isneginf()
    for scores in (found, twin):
        assert (scores.double() - exact)[real].abs().max() < 1e-5 * exact[real].abs().max()


@needs_library
def test_chunks_beyond_their_buffers_are_refused():
    store = make_store([5, 6], 16, 16, torch.float32)
    query, key = torch.randn(1, 2, 1, 16), torch.randn(64, 16)

    def attend(blocks, rows, key=key):
        ints = [torch.tensor(part, dtype=torch.int32) for part in (blocks, rows)]
        return native.attend_chunks(query, store, ChosenChunks(key, key, *ints, 32), LogitOptions(1.0), max_length=6)

    attend([[0], [32]], [[32], [32]])
    for blocks, rows in (
        ([[0], [33]], [[32], [32]]),
        ([[-1], [0]], [[2], [2]]),
        ([[0], [0]], [[33], [2]]),
        ([[0], [0]], [[-1], [2]]),
    ):
        with pytest.raises(RuntimeError, match="reaches beyond the buffer of 64 rows"):
            attend(blocks, rows)
    with pytest.raises(RuntimeError, match="blocks and block_rows"):
        attend([[0]], [[1]])
    with pytest.raises(RuntimeError, match="as wide as"):
        attend([[0], [0]], [[1], [1]], key=torch.randn(64, 32))
    with pytest.raises(RuntimeError, match="the store's dtype"):
        attend([[0], [0]], [[1], [1]], key=torch.randn(64, 16).half())
    codes, grid, ints = torch.zeros(4, 16, dtype=torch.uint8), torch.ones(2, 2, 16), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="beyond 4 chunks"):
        native.chunk_scores(query, codes, grid, ints, ints + 3, longest=9)
    with pytest.raises(RuntimeError, match="uint8 .chunks, D."):
        native.chunk_scores(query, codes[:, :8].contiguous(), grid, ints, ints, longest=9)
    with pytest.raises(RuntimeError, match="float32 .S, 2, D."):
        native.chunk_scores(query, codes, grid[:1], ints, ints, longest=9)
