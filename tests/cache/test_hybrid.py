"""hybridkv: how heads are told apart, who gets which rows, which chunks are chosen, and every way of generating."""

import copy
import functools
import pickle

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from support import oracle, zoo

import mixkv
from mixkv.ops.arguments import LogitOptions
from mixkv.selection import hybrid
from mixkv.selection.global_budget import allocate_chunks
from mixkv.selection.sparsity import scoring_queries, sparsity
from mixkv.storage import chunk_bounds

LENGTH = 300
OPTIONS = dict(method="hybridkv", budget=110, window=14)
DEFAULTS = mixkv.MixKVConfig()
CHUNK, FIRST, LAST = DEFAULTS.hybrid_chunk, DEFAULTS.hybrid_first, DEFAULTS.hybrid_last
ALL_DYNAMIC = OPTIONS | dict(hybrid_threshold=1.0)
FAMILIES = ("llama", "gemma2", "gemma3", "gpt_oss", "qwen2_vl")


def build(name):
    return zoo.build(name, zoo.FAMILIES[name].attn[-1])


@functools.cache
def threshold(name, window=OPTIONS["window"]):
    """Between the sparsities of a model's heads, so that there are both kinds."""
    model = build(name)
    cache = mixkv.MixKVCache(model, **OPTIONS | dict(window=window))
    with torch.no_grad():
        model(**zoo.inputs(name, LENGTH), past_key_values=cache)
    return float(torch.cat([part.flatten() for part in cache.stats()["sparsity"] if part is not None]).median()) + 1e-6


def empty(model, name, **changes):
    return mixkv.MixKVCache(model, **OPTIONS | dict(hybrid_threshold=threshold(name)) | changes)


def chunked_layers(cache):
    return [layer for layer in cache.layers if getattr(layer, "chunks", None) is not None]


def naive_sparsity(query, key, rows, valid, scaling, softcap, sinks):
    batch, query_heads, window, _ = query.shape
    heads, length = key.shape[1:3]
    groups = query_heads // heads
    found = torch.zeros(batch, heads)
    for b in range(batch):
        for h in range(heads):
            shares = []
            for w in range(window):
                if not rows[b, w]:
                    continue
                seen = [n for n in range(length - window + w + 1) if valid is None or valid[b, n]]
                others = torch.tensor([place >= FIRST and n < length - window for place, n in enumerate(seen)])
                most = 0.0
                for q in range(h * groups, (h + 1) * groups):
                    logits = key[b, h, seen].double() @ query[b, q, w].double() * scaling
                    if softcap is not None:
                        logits = softcap * torch.tanh(logits / softcap)
                    if sinks is not None:
                        logits = torch.cat([logits, sinks[q].double().view(1)])
                    most = max(most, float(logits.softmax(0)[: len(seen)][others].sum()))
                shares.append(1 - most)
            found[b, h] = sum(shares) / len(shares)
    return found


@pytest.mark.parametrize("softcap, with_sinks", [(None, False), (5.0, False), (None, True)])
@pytest.mark.parametrize("window, length, pad", [(1, 1, 0), (5, 40, 0), (11, 40, 7), (9, 9, 3)])
def test_sparsity_equals_loops(window, length, pad, softcap, with_sinks):
    torch.manual_seed(length + pad)
    query, key = 3 * torch.randn(2, 6, window, 16), torch.randn(2, 2, length, 16)
    sinks = torch.randn(6) if with_sinks else None
    valid = None
    if pad:
        valid = torch.ones(2, length, dtype=torch.bool)
        valid[0, :pad] = False
    image = torch.zeros(2, length, dtype=torch.bool)
    image[1, length // 4 : length - 2] = True
    rows = scoring_queries(2, window, image, valid, key.device)
    assert rows.any(dim=1).all()
    found = sparsity(query, key, rows, valid, LogitOptions(0.4, softcap, sinks), first=FIRST)
    assert torch.allclose(found, naive_sparsity(query, key, rows, valid, 0.4, softcap, sinks), atol=1e-6)


def test_scoring_queries_are_the_text_after_the_last_image():
    image = torch.zeros(3, 10, dtype=torch.bool)
    image[0, 2:5] = image[1, 4:8] = image[2, 6:] = True
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[0, :6] = False
    rows = scoring_queries(3, 5, image, valid, image.device)
    assert rows.tolist() == [[False, True, True, True, True], [False, False, False, True, True], [True] * 5]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(0, 40),
    st.integers(1, 40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_entries_are_allocated_exactly(heads, base, candidates, window, chunk, threshold, floor, seed):
    sparse = torch.rand(2, heads, generator=torch.Generator().manual_seed(seed))
    bases, candidates = torch.tensor([base, base // 2]), torch.tensor([candidates, candidates // 3]).view(2, 1).expand(2, heads)
    windows = torch.full((2, heads), window)
    choosable = candidates + window
    split = hybrid.allocate_entries(
        sparse, bases, choosable, window=windows, chunk=chunk, threshold=threshold, floor=floor, first=FIRST
    )
    assert torch.equal(split.entries.sum(1), (bases * heads).minimum(candidates.sum(1)) + heads * window)
    assert ((split.entries >= 0) & (split.entries <= choosable)).all()
    assert (split.entries >= window)[~split.dynamic].all()
    assert threshold == 1 or not (split.dynamic & (sparse >= threshold)).any()
    assert torch.equal(split.slots > 0, split.dynamic)
    assert (split.fixed >= split.first).all()
    assert torch.equal(split.first, FIRST * split.dynamic.long())
    assert ((split.fixed - split.first) < chunk)[split.dynamic].all()
    for row in range(2):
        dynamic = split.dynamic[row]
        static_full = (split.entries[row] == choosable[row])[~dynamic].all()
        if dynamic.any() and not static_full:
            assert (split.entries[row][dynamic] == FIRST + (bases[row] + window - FIRST) // chunk * chunk).all()
        # Every chunk that is chosen exists.
        chunks = (choosable[row] - split.fixed[row] + chunk - 1) // chunk
        assert (split.slots[row] <= chunks).all()


def test_sparser_static_heads_get_fewer_rows():
    sparse = torch.tensor([[0.99, 0.92, 0.5, 0.95]])
    windows = torch.full((1, 4), 24)
    split = hybrid.allocate_entries(
        sparse, torch.tensor([70]), torch.full((1, 4), 524), window=windows, chunk=32, threshold=0.9, floor=0.2, first=FIRST
    )
    assert split.dynamic.tolist() == [[False, False, True, False]]
    assert split.entries[0, 2] == 68 and split.slots[0, 2] == 2 and split.first[0, 2] == 4
    assert split.entries[0, 0] < split.entries[0, 3] < split.entries[0, 1] and split.entries.sum() == 4 * 94


def test_a_threshold_of_one_prunes_no_head():
    sparse, windows = torch.tensor([[1.0, 0.2]]), torch.zeros(1, 2, dtype=torch.int64)
    split = hybrid.allocate_entries(
        sparse, torch.tensor([70]), torch.full((1, 2), 500), window=windows, chunk=8, threshold=1.0, floor=0.2, first=FIRST
    )
    assert split.dynamic.all()


def test_text_comes_before_images():
    ranks = torch.tensor([[[3, 0, 2, 5, 1, 4]], [[6, 6, 0, 3, 2, 1]]])
    image = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0]]).bool()
    found = hybrid.text_first(ranks, image)
    assert found.tolist() == [[[5, 3, 0, 2, 4, 1]], [[6, 6, 2, 3, 1, 0]]]


def test_static_heads_keep_text_before_images():
    model, prompts = build("qwen2_vl"), zoo.inputs("qwen2_vl", LENGTH)
    options = OPTIONS | dict(hybrid_threshold=0.0, budget=200, window=16)
    cache = mixkv.MixKVCache(model, **options)
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
    numbers = cache.stats()
    images = int((prompts["input_ids"] == zoo.IMAGE).sum())
    assert numbers["dynamic"][0].any().logical_not()
    for image, length in zip(numbers["image_rows"], numbers["lengths"]):
        text = LENGTH - images
        assert torch.equal(image, (length - text).clamp(min=0)) or (length < text).any()
        assert (image[length <= text] == 0).all()


def levels(codes, grid):
    """The bounds [chunks, D] of one sequence, largest and smallest, as they are told."""
    lowest, step = grid.double()
    return lowest + step * (codes >> 4).double(), lowest + step * (codes & 15).double()


@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_key_exceeds_its_chunks_score(dtype, shift):
    torch.manual_seed(0)
    keys, starts, rows = torch.randn(150, 16) + shift * torch.randn(16), torch.tensor([0, 32, 64, 90]), [32, 32, 26, 1]
    keys[:, 3] = -2.5
    keys = keys.to(dtype)
    sequence = torch.tensor([0, 0, 0, 2])
    codes, grid = chunk_bounds.of_chunks(keys, starts, torch.tensor(rows), sequence, 3, 32)
    assert codes.shape == (4, 16) and grid.shape == (3, 2, 16) and torch.isfinite(grid).all()
    query = torch.randn(1, 6, 1, 16).to(dtype)
    layout = [torch.tensor(part, dtype=torch.int32) for part in ([0, 3, 3], [3, 0, 1])]
    scores = mixkv.ops.reference.chunk_scores(query, codes, grid, *layout, longest=4)
    assert scores.isneginf().tolist() == [[False] * 3 + [True], [True] * 4, [False] + [True] * 3]
    for chunk in range(4):
        s = int(sequence[chunk])
        part = keys[starts[chunk] : starts[chunk] + rows[chunk]].double()
        high, low = levels(codes[chunk], grid[s])
        lowest, step = grid[s].double()
        slack = 1e-6 * (1 + part.abs().max())
        assert (high >= part.amax(0) - slack).all() and (low <= part.amin(0) + slack).all()
        assert (high - part.amax(0) <= 1.001 * step + slack).all() and (part.amin(0) - low <= 1.001 * step + slack).all()
        mine = query[0, 2 * s : 2 * s + 2, 0].double()
        bound = torch.maximum(mine.unsqueeze(1) * high, mine.unsqueeze(1) * low).sum(-1).max()
        score = scores[s, chunk % 3].double()
        assert abs(score - bound) < 1e-5 * (1 + shift)
        assert score >= (mine @ part.T).max() - 1e-5 * (1 + shift)


def test_no_chosen_chunk_is_below_one_not_chosen():
    model, prompts = build("llama"), zoo.inputs("llama", LENGTH, batch=2)
    cache = empty(model, "llama")
    seen = []
    with torch.no_grad():
        logits = model(**prompts, past_key_values=cache).logits
    for layer in chunked_layers(cache):
        choose = layer.chunks.choose

        def watched(query, store=layer.chunks, choose=choose):
            chosen = choose(query)
            batch, new, query_heads, size = query.shape
            keys, _ = store.held()
            for s, (start, rows) in enumerate(zip(store.starts.tolist(), store.rows.tolist())):
                if rows == 0:
                    assert (chosen.flatten(0, 2)[s] == -1).all()
                    continue
                groups = query_heads // (store.starts.numel() // batch)
                heads = query_heads // groups
                mine = query[s // heads, 0, s % heads * groups : (s % heads + 1) * groups]
                parts = keys[start : start + rows].split(CHUNK)
                first = int(store.bound_starts[s])
                sides = levels(store.codes[first : first + len(parts)], store.grid[s])
                highest = torch.maximum(*(mine.double().unsqueeze(1) * side for side in sides)).sum(-1).amax(0).tolist()
                assert all((mine @ part.T).max() <= most + 1e-4 for part, most in zip(parts, highest))
                picked = set(chosen.flatten(0, 2)[s].tolist()) - {-1}
                assert len(picked) == store.slots[s] > 0
                others = [b for index, b in enumerate(highest) if index not in picked]
                assert min(highest[index] for index in picked) >= max(others) - 1e-4
                seen.append(len(others))
            return chosen

        layer.chunks.choose = watched
    with torch.no_grad():
        model(logits[:, -1:].argmax(-1), past_key_values=cache)
    assert seen and min(seen) > 0


def choose_all(cache):
    """Every chunk is chosen from now on."""
    for layer in chunked_layers(cache):
        layer.chunks.set_slots(layer.chunks.counts)


@pytest.mark.parametrize("offload", ["in place", "slots"])
@pytest.mark.parametrize("name", FAMILIES)
def test_with_every_chunk_chosen_logits_are_the_full_caches(name, offload):
    model, prompts = build(name), zoo.inputs(name, LENGTH, batch=2)
    tokens, expected = oracle.generate(model, prompts, 8)
    cache = mixkv.MixKVCache(model, **ALL_DYNAMIC)
    with torch.no_grad():
        assert (model(**prompts, past_key_values=cache).logits[:, -1] - expected[:, 0]).abs().max() < 1e-4
        assert chunked_layers(cache)
        choose_all(cache)
        for layer in chunked_layers(cache):
            if offload == "slots":
                layer.chunks.fetch_to_slots()
        parts = [tokens[:, :1], tokens[:, 1:2], tokens[:, 2:7]]
        logits = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
    assert (logits - expected[:, 1:]).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("offload", ["in place", "slots"])
def test_decoding_equals_a_full_cache_masked_to_resident_and_chosen_rows(name, offload):
    model, prompts = build(name), zoo.inputs(name, LENGTH, batch=2)
    cache = empty(model, name)
    with torch.no_grad():
        logits = [model(**prompts, past_key_values=cache).logits[:, -1]]
        resident, steps = {}, []
        for index, layer in enumerate(cache.layers):
            if hasattr(layer, "store"):
                resident[index] = layer.store.positions()
                if layer.chunks is not None and offload == "slots":
                    layer.chunks.fetch_to_slots()
        for _ in range(4):
            chosen = {}
            for index in resident:
                watch(cache.layers[index], index, chosen)
            token = logits[-1].argmax(-1, keepdim=True)
            logits.append(model(token, past_key_values=cache).logits[:, -1])
            steps.append((token, chosen))
    assert any(step[1] for step in steps)
    mixkv.unpatch(model)
    stock = transformers.DynamicCache(config=model.config)
    masks = [None] * len(cache.layers)
    with oracle.masked(model, masks, LENGTH), torch.no_grad():
        model(**prompts, past_key_values=stock)
        for step, (token, chosen) in enumerate(steps):
            for index, positions in resident.items():
                masks[index] = mask = torch.zeros(2, len(positions[0]), LENGTH, dtype=torch.bool)
                for row, heads in enumerate(positions):
                    for head, columns in enumerate(heads):
                        mask[row, head, columns.long()] = True
                        for column in chosen.get(index, {}).get((row, head), []):
                            mask[row, head, column] = True
            expected = model(token, past_key_values=stock).logits[:, -1]
            assert (logits[step + 1] - expected).abs().max() < 1e-4


def watch(layer, index, chosen):
    """Notes the columns that a layer's heads choose in the next step."""
    if layer.chunks is None:
        return
    store, choose = layer.chunks, type(layer.chunks).choose

    def watched(query):
        found = choose(store, query)
        for (row, _, head), chunks in zip(
            torch.cartesian_prod(*map(torch.arange, found.shape[:3])).tolist(), found.flatten(0, 2).tolist()
        ):
            s = row * found.shape[2] + head
            first, last = int(store.first_positions[s]), int(store.first_positions[s] + store.rows[s])
            spans = [range(first + CHUNK * c, min(first + CHUNK * (c + 1), last)) for c in chunks if c >= 0]
            chosen.setdefault(index, {})[row, head] = [column for span in spans for column in span]
        return found

    store.choose = watched


@pytest.mark.parametrize(
    "budget, window, chunk", [(0.4, 14, 8), (110, 6, 32), (64, 14, 5), (39, 6, 32), (39, 32, 8), (17, 1, 1)]
)
@pytest.mark.parametrize("prune", ["all", "half", "none"])
def test_resident_rows_are_exact(budget, window, chunk, prune):
    model, prompts = build("llama"), zoo.inputs("llama", LENGTH, batch=2)
    least = {"all": 0.0, "half": threshold("llama", window), "none": 1.0}[prune]
    cache = empty(model, "llama", budget=budget, window=window, hybrid_chunk=chunk, hybrid_threshold=least)
    oracle.generate(model, prompts, 4, past_key_values=cache)
    numbers = cache.stats()
    rows = round(budget * LENGTH) if isinstance(budget, float) else budget
    # Chunks a step are shared out over the layers, everything else is within each of them.
    stores = [layer.chunks for layer in cache.layers]
    slots = torch.stack([torch.zeros(2, 2) if store is None else store.slots.view(2, 2) for store in stores])
    lengths = torch.stack(numbers["lengths"])
    assert lengths.sum(dim=(0, 2)).tolist() == [2 * len(cache.layers) * (rows + 3)] * 2
    if prune == "none":
        assert len(set((lengths - chunk * slots).flatten().tolist())) == 1
    assert numbers["rows"] == 2 * 2 * len(cache.layers) * (rows + 3)
    for layer, columns in enumerate(map(cache.kept, range(len(cache.layers)))):
        for row in range(2):
            for head, dynamic in enumerate(numbers["dynamic"][layer][row].tolist()):
                held = columns[row][head].tolist()
                assert held == sorted(set(held))
                assert len(held) == (LENGTH + 3 if dynamic else numbers["lengths"][layer][row, head])
    if numbers["chunks"] is not None:
        told = numbers["chunks"]
        assert told["steps"] == 3 and told["reused"] + told["moved"] == told["chosen"]
        assert told["chosen"] == sum(int(layer.chunks.slots.sum()) for layer in chunked_layers(cache))
        assert numbers["bytes_outside"] == sum(layer.chunks.pool.nbytes for layer in chunked_layers(cache))
        assert numbers["bytes_resident"] + numbers["bytes_outside"] == numbers["bytes"]
        dynamic = sum(int(layer.chunks.counts.sum()) for layer in chunked_layers(cache))
        size = cache.layers[0].shape[1]
        assert numbers["bytes_bounds"] == size * (
            dynamic + 8 * sum(layer.chunks.counts.numel() for layer in chunked_layers(cache))
        )
    assert (numbers["chunks"] is None) == (prune == "all" or rows < min(window, LAST) + FIRST + chunk)


def test_chunks_a_step_go_where_votes_go():
    """Against a plain count: each dynamic head one, the others in proportion to the rows that `global` gives it with that floor."""
    model, prompts = build("llama"), zoo.inputs("llama", LENGTH, batch=2)
    options = dict(budget=110, window=14, score="mix")
    equal, shared = (mixkv.MixKVCache(model, **ALL_DYNAMIC | options, hybrid_floor=floor) for floor in (1.0, 0.2))
    contest = mixkv.MixKVCache(model, **options, method="global", global_floor=0.2)
    with torch.no_grad():
        for cache in (equal, shared, contest):
            model(**prompts, past_key_values=cache)
    before, after = (torch.stack([layer.chunks.slots.view(2, -1) for layer in cache.layers], 1) for cache in (equal, shared))
    assert len(set(before.flatten().tolist())) == 1 and len(set(after.flatten().tolist())) > 2
    assert (after.sum(dim=(1, 2)) == before.sum(dim=(1, 2))).all() and (after >= 1).all()
    votes = torch.stack([length - options["window"] for length in contest.stats()["lengths"]], 1).double()
    total, heads = int(before[0].sum()), before[0].numel()
    for row in range(2):
        for got, rows in zip(after[row].flatten().tolist(), votes[row].flatten().tolist()):
            assert abs(got - (1 + (total - heads) * rows / votes[row].sum())) < 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_shared_slots_are_exact(data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    equal = torch.randint(0, 6, (batch, heads), generator=generator)
    limit = equal + torch.randint(0, 9, equal.shape, generator=generator)
    rows = torch.randint(0, 50, equal.shape, generator=generator) * torch.randint(0, 2, equal.shape, generator=generator)
    slots = allocate_chunks(equal, rows, limit)
    assert torch.equal(slots.sum(-1), equal.sum(-1))
    assert torch.equal(slots > 0, equal > 0) and (slots <= limit).all()


def test_a_padded_batch_equals_its_rows_alone():
    for name in FAMILIES:
        model = build(name)
        batch, rows = zoo.ragged(name, [LENGTH, LENGTH - 37, LENGTH - 150])
        cache = empty(model, name)
        tokens, logits = oracle.generate(model, batch, 5, past_key_values=cache)
        for index, prompt in enumerate(rows):
            alone = empty(model, name)
            row_tokens, row_logits = oracle.generate(model, prompt, 5, past_key_values=alone)
            assert torch.equal(tokens[index], row_tokens[0])
            assert (logits[index] - row_logits[0]).abs().max() < 1e-4
            oracle.assert_keeps_as_alone(cache, index, alone, LENGTH - prompt["input_ids"].shape[1])


@pytest.mark.parametrize("offload", ["in place", "slots"])
def test_several_tokens_at_once_choose_each_for_itself(offload):
    model, prompts = build("llama"), zoo.inputs("llama", LENGTH, batch=2)
    cache = empty(model, "llama")
    more = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        for layer in chunked_layers(cache):
            if offload == "slots":
                layer.chunks.fetch_to_slots()
        apart, blocks = copy.deepcopy(cache), copy.deepcopy(cache)
        together = model(more, past_key_values=cache).logits
        one_by_one = torch.cat([model(more[:, i : i + 1], past_key_values=apart).logits for i in range(9)], dim=1)
        assert (together - one_by_one).abs().max() < 1e-4
        assert cache.stats()["chunks"] == apart.stats()["chunks"]
        limit, mixkv.storage.chunks._READ_ROWS = mixkv.storage.chunks._READ_ROWS, 2000
        try:
            assert (model(more, past_key_values=blocks).logits - together).abs().max() < 1e-4
        finally:
            mixkv.storage.chunks._READ_ROWS = limit


def test_turns_with_padding_in_both():
    model = build("llama")
    batch, rows = zoo.ragged("llama", [LENGTH, LENGTH - 41])
    added = [torch.randint(4, 100, (1, n), generator=torch.Generator().manual_seed(n)) for n in (3, 6)]
    block = torch.cat([torch.nn.functional.pad(part, (6 - part.shape[1], 0)) for part in added])
    mask = torch.cat([batch["attention_mask"], (block > 0).long()], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    together = empty(model, "llama")
    with torch.no_grad():
        model(**batch, past_key_values=together, position_ids=places[:, :LENGTH])
        logits = model(input_ids=block, attention_mask=mask, past_key_values=together, position_ids=places[:, LENGTH:]).logits
        for row in range(2):
            alone = empty(model, "llama")
            model(**rows[row], past_key_values=alone)
            expected = model(input_ids=added[row], past_key_values=alone).logits[0]
            assert (logits[row, -added[row].shape[1] :] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("offload", ["in place", "slots"])
def test_beams_equal_rows_followed_one_by_one(offload, monkeypatch):
    if offload == "slots":
        make = mixkv.storage.chunks.ChunkStore.from_plan.__func__

        def with_slots(cls, *arguments, **options):
            store = make(cls, *arguments, **options)
            if store is not None:
                store.fetch_to_slots()
            return store

        monkeypatch.setattr(mixkv.storage.chunks.ChunkStore, "from_plan", classmethod(with_slots))
    model, prompts = build("llama"), zoo.inputs("llama", LENGTH, batch=2)
    out = oracle.beams(model, prompts, empty(model, "llama"))
    for row in range(2):
        single = {key: value[row : row + 1] for key, value in prompts.items()}
        cache = empty(model, "llama")
        answer = out.sequences[row, LENGTH:]
        with torch.no_grad():
            logits = [model(**single, past_key_values=cache).logits[:, -1]]
            for token in answer[:-1]:
                logits.append(model(token.view(1, 1), past_key_values=cache).logits[:, -1])
        score = torch.cat(logits).log_softmax(-1).gather(1, answer.unsqueeze(1)).sum()
        assert abs(score - out.sequences_scores[row]) < 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_assisted_decoding_gives_the_greedy_tokens(name):
    if zoo.FAMILIES[name].has_sliding and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("transformers up to 5.17 cannot take rejected drafts back from sliding-window layers")
    model, prompts = build(name), zoo.inputs(name, LENGTH)
    prompts["input_ids"][:, -12:] = prompts["input_ids"][:, :12]
    greedy, _ = oracle.generate(model, prompts, 12, past_key_values=empty(model, name))
    for extra in (dict(prompt_lookup_num_tokens=5), dict(assistant_model=build(name))):
        cache = empty(model, name)
        tokens = model.generate(**prompts, max_new_tokens=12, do_sample=False, past_key_values=cache, **extra)
        assert torch.equal(tokens[:, LENGTH:], greedy)


def test_chunked_prefill_is_compressed_once():
    model, prompts = build("llama"), zoo.inputs("llama", LENGTH, batch=2)
    _, expected = oracle.generate(model, prompts, 4, past_key_values=empty(model, "llama"))
    cache = empty(model, "llama")
    _, logits = oracle.generate(model, prompts, 4, past_key_values=cache, prefill_chunk_size=64)
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen2_vl"])
def test_copies_and_files_go_on_alike(name, tmp_path):
    model, prompts = build(name), zoo.inputs(name, LENGTH, batch=2)
    cache = empty(model, name)
    more = torch.randint(4, 100, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        model(more[:, :1], past_key_values=cache)
        cache.save(tmp_path / "cache")
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), mixkv.MixKVCache.load(tmp_path / "cache", model)]
        assert [len(chunked_layers(part)) for part in copies] == [len(chunked_layers(cache))] * 3
        expected = model(more, past_key_values=cache).logits
        for part in copies:
            assert torch.equal(model(more, past_key_values=part).logits, expected)
            assert all(
                one is None or torch.equal(one, other)
                for name in ("lengths", "sparsity", "dynamic")
                for one, other in zip(part.stats()[name], cache.stats()[name])
            )
    shared = chunked_layers(copies[0])[0].chunks.pool
    assert shared.key.data_ptr() == chunked_layers(cache)[0].chunks.pool.key.data_ptr()


def test_a_damaged_file_is_refused(tmp_path):
    model, prompts = build("llama"), zoo.inputs("llama", LENGTH)
    cache = empty(model, "llama")
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
    chunked_layers(cache)[0].chunks.first_positions.add_(LENGTH)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="damaged .layer . has chunk_rows"):
        mixkv.MixKVCache.load(tmp_path / "cache", model)


def test_rows_are_taken_and_tokens_taken_back():
    model, prompts = build("llama"), zoo.inputs("llama", LENGTH, batch=3)
    step = torch.tensor([[7], [8], [9]])
    cache = empty(model, "llama")
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        other = copy.deepcopy(cache)
        for layer in chunked_layers(other):
            layer.chunks.fetch_to_slots()
        for part in (cache, other):
            model(step, past_key_values=part)
        before = copy.deepcopy(cache)
        expected = model(step, past_key_values=before).logits
        for part in (cache, other):
            model(torch.tensor([[9, 9], [9, 9], [9, 9]]), past_key_values=part)
            part.crop(-2)
            part.reorder_cache(torch.tensor([2, 0, 0]))
            part.batch_select_indices(torch.tensor([1, 0]))
            logits = model(step[[0, 2]], past_key_values=part).logits
            assert (logits - expected[[0, 2]]).abs().max() < 1e-4
            assert part.stats()["lengths"][0].shape[0] == 2


def test_slots_fetch_only_what_they_lack():
    model, prompts = build("llama"), zoo.inputs("llama", LENGTH, batch=2)
    cache = empty(model, "llama")
    fetched = []
    fetch = mixkv.ops.dispatch.fetch_chunks
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        for layer in chunked_layers(cache):
            layer.chunks.fetch_to_slots()
        mixkv.ops.dispatch.fetch_chunks = lambda *args, **options: (
            fetched.append(int((args[5] > 0).sum())),
            fetch(*args, **options),
        )
        try:
            for token in range(5, 12):
                model(torch.tensor([[token], [token]]), past_key_values=cache)
        finally:
            mixkv.ops.dispatch.fetch_chunks = fetch
    numbers = cache.stats()["chunks"]
    assert sum(fetched) == sum(layer.chunks.moved for layer in chunked_layers(cache)) == round(numbers["moved"] * 7)
    assert 0 < numbers["moved"] < numbers["chosen"]


def test_a_prompt_within_its_budget_is_kept_whole():
    model, prompts = build("llama"), zoo.inputs("llama", 60)
    _, expected = oracle.generate(model, prompts, 5)
    cache = empty(model, "llama")
    _, logits = oracle.generate(model, prompts, 5, past_key_values=cache)
    assert (logits - expected).abs().max() < 1e-4 and not chunked_layers(cache)
    assert cache.stats()["dynamic"][0].any().logical_not() and cache.stats()["bytes_outside"] == 0


def test_offload_false_counts_everything_as_resident():
    model, prompts = build("llama"), zoo.inputs("llama", LENGTH)
    cache = empty(model, "llama", offload=False)
    oracle.generate(model, prompts, 2, past_key_values=cache)
    numbers = cache.stats()
    assert chunked_layers(cache) and numbers["bytes_outside"] == 0 and numbers["bytes_resident"] == numbers["bytes"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(decode_budget=64), "decode_budget=64 does not go with method='hybridkv'"),
        (dict(hybrid_threshold=1.5), "hybrid_threshold=1.5 must be a number from 0 to 1"),
        (dict(hybrid_chunk=0), "hybrid_chunk=0 must be a positive int"),
        (dict(hybrid_floor=-1), "hybrid_floor=-1 must be"),
        (dict(offload="no"), "offload='no' must be True or False"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        mixkv.MixKVConfig(method="hybridkv", **options)
