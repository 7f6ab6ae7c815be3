"""Heads of all layers compete: the streamed result is the offline one, totals are exact, memory is bounded."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle, zoo

import mixkv
from mixkv import MixKVConfig
from mixkv.selection.apportion import apportion
from mixkv.selection.global_budget import GlobalBudget
from mixkv.selection.global_topk import GlobalTopK
from mixkv.selection.select import rank
from mixkv.storage.ragged import RaggedStore

OPTIONS = dict(method="global", score="mix-output", budget=14, window=6)


def offline(importance, base, floor):
    """Rows per layer and head of one prompt, by sorting all candidates of the model, and of each layer: importance [L][H][M]."""
    layers, heads = len(importance), len(importance[0])
    largest = [rows.max() ** (MixKVConfig.layer_exponent) if rows.max() > 0 else 1.0 for rows in importance]
    entries = [
        (-(value / largest[layer]).item(), layer, head, column)
        for layer, rows in enumerate(importance)
        for head, row in enumerate(rows)
        for column, value in enumerate(row)
        if value != -torch.inf
    ]
    limit = len(entries) // (layers * heads)
    base = min(base, limit)
    counts = torch.zeros(layers * heads, dtype=torch.float64)
    for _, layer, head, _ in sorted(entries)[: base * layers * heads]:
        counts[layer * heads + head] += limit - base
    for one in range(layers):
        for _, _, head, _ in sorted(entry for entry in entries if entry[1] == one)[: base * heads]:
            counts[one * heads + head] += base
    shares = (1 - floor) * (counts / max(limit, 1)) + floor * base
    total, limits = torch.tensor(base * layers * heads), torch.full((layers * heads,), limit)
    return torch.from_numpy(apportion(shares, total, limits)).view(layers, heads)


@dataclass
class Layer:
    """What a `GlobalBudget` uses of a layer."""

    store: RaggedStore
    key: torch.Tensor
    share: list[float] | None = None

    @property
    def row_totals(self):
        return self.store.row_totals

    def evict(self, ranks, quota):
        return self.store.evict(ranks, quota.flatten())


def prompt(layers, heads, length, window, seed, pads, levels):
    """What each layer sees: query, key, value, mask. Few ``levels`` of value make ties."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(pads)
    mask = torch.arange(length) >= torch.tensor(pads).unsqueeze(-1)
    for layer in range(layers):
        draw = [
            torch.randn(batch, h, n, 16, generator=generator)
            for h, n in ((2 * heads, window), (heads, length), (heads, length))
        ]
        scale = torch.rand(1, heads, 1, 1, generator=generator) * 3
        value = (draw[2] * scale * levels).round() / levels
        yield draw[0] * (0 if levels == 1 else 1), draw[1], value, mask


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 6),
    heads=st.integers(1, 3),
    length=st.integers(9, 40),
    budget=st.integers(7, 30),
    floor=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    pads=st.sampled_from([(0,), (0, 3), (5, 0, 2)]),
    levels=st.sampled_from([1, 2, 1000]),
    seed=st.integers(0, 999),
)
def test_streaming_equals_offline(layers, heads, length, budget, floor, pads, levels, seed):
    config = MixKVConfig(method="global", score="mix-output", budget=budget, window=6, global_floor=floor)
    shared, held, rankings = GlobalBudget(layers, floor), [], []
    total = None
    for query, key, value, mask in prompt(layers, heads, length, 6, seed, pads, levels):
        ranking = rank(query, key, value, config, attention_mask=mask)
        rankings.append(ranking)
        before = sum(layer.store.total for layer in held)
        assert total is None or before <= total
        selection = ranking.take(shared.add_layer(ranking))
        layer = Layer(RaggedStore.from_selection(key, value, selection, "torch"), key)
        held.append(layer)
        shared.finish_layer(layer, selection)
        total = shared.total + shared.slack
    assert shared.complete
    for row, pad in enumerate(pads):
        importance = [ranking.importance[row] for ranking in rankings]
        quota = offline(importance, budget - 6, floor)
        real = length - pad
        assert sum(layer.store.row_totals[row] for layer in held) == layers * heads * min(budget, real)
        for index, (layer, ranking) in enumerate(zip(held, rankings)):
            kept = layer.store.positions()[row]
            for head in range(heads):
                best = (ranking.ranks[row, head] < quota[index, head]).nonzero().flatten().tolist()
                assert kept[head].tolist() == best + list(range(length - min(6, real), length))
                rows = layer.store.padded()[0][row, head, -len(kept[head]) :]
                assert torch.equal(rows, layer.key[row, head, kept[head].long()])


def test_few_layers_are_laid_out_anew(monkeypatch):
    """Every layer once in the end, and few before that; what is held meanwhile stays within the total and its slack."""
    evictions = []
    evict = RaggedStore.evict
    monkeypatch.setattr(RaggedStore, "evict", lambda store, *args: evictions.append(store) or evict(store, *args))
    layers, heads, length = 24, 2, 256
    config = MixKVConfig(method="global", score="mix-output", budget=48, window=6)
    budgeted, held = GlobalBudget(layers, 0.2), []
    for query, key, value, _ in prompt(layers, heads, length, 6, 1, (0,), 1000):
        assert sum(layer.store.total for layer in held) <= budgeted.total + budgeted.slack
        ranking = rank(query, key, value, config)
        selection = ranking.take(budgeted.add_layer(ranking))
        held.append(Layer(RaggedStore.from_selection(key, value, selection, "torch"), key))
        budgeted.finish_layer(held[-1], selection)
    assert budgeted.complete and sum(layer.store.total for layer in held) == budgeted.total == layers * heads * 48
    assert 0 < budgeted.slack <= min(budgeted.total / 8, heads * length / 4)
    assert layers <= len(evictions) <= 2.5 * layers


def test_quotas_so_far_are_never_below_the_final_ones():
    counts = GlobalTopK(0.2)
    generator = torch.Generator().manual_seed(3)
    seen = []
    for _ in range(5):
        importance = torch.rand(2, 3, 50, generator=generator)
        counts.add(torch.tensor([9, 9]), torch.full((2, 3), 50), importance, num_layers=5)
        seen.append(counts.quota())
    final = seen[-1]
    assert final.sum(dim=(1, 2)).tolist() == [5 * 3 * 9] * 2
    assert (final >= int(0.2 * 9)).all()
    for count, quota in enumerate(seen[:-1], 1):
        assert (quota >= final[:, :count]).all()
    assert all((a[:, : b.shape[1]] <= b).all() for b, a in zip(seen, seen[1:]))


def test_layers_with_other_numbers_of_heads_are_refused():
    counts = GlobalTopK(0.2)
    counts.add(torch.tensor([2]), torch.full((1, 3), 9), torch.rand(1, 3, 9), num_layers=2)
    with pytest.raises(ValueError, match="layer 1 has 2 KV heads and the first has 3"):
        counts.add(torch.tensor([2]), torch.full((1, 2), 9), torch.rand(1, 2, 9), num_layers=2)


FAMILIES = ["llama", "qwen3", "gemma3"]


def rows_per_layer(cache):
    return [int(lengths.sum()) for lengths in cache.stats()["lengths"] if lengths is not None]


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_batch_equals_its_rows_alone(name):
    model = zoo.build(name, "sdpa")
    least = zoo.FAMILIES[name].min_length
    batch, rows = zoo.ragged(name, [least + 34, least + 21])
    cache = mixkv.MixKVCache(model, **OPTIONS)
    tokens, _ = oracle.generate(model, batch, 4, past_key_values=cache)
    for index, alone in enumerate(rows):
        single = mixkv.MixKVCache(model, **OPTIONS)
        assert torch.equal(tokens[index], oracle.generate(model, alone, 4, past_key_values=single)[0][0])
        pad = batch["input_ids"].shape[1] - alone["input_ids"].shape[1]
        oracle.assert_keeps_as_alone(cache, index, single, pad)


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_and_layers_differ_and_the_total_is_exact(name):
    model = zoo.build(name, "sdpa")
    with torch.no_grad():
        for index, layer in enumerate(model.get_decoder().layers):
            layer.self_attn.o_proj.weight.mul_(1 + 3 * (index % 2))
    prompts = zoo.inputs(name, zoo.FAMILIES[name].min_length + 40)
    cache = mixkv.MixKVCache(model, **OPTIONS)
    oracle.generate(model, prompts, 1, past_key_values=cache)
    numbers = cache.stats()
    lengths = [lengths for lengths in numbers["lengths"] if lengths is not None]
    assert sum(int(part.sum()) for part in lengths) == 14 * sum(part.numel() for part in lengths)
    assert len(set(torch.cat([part.flatten() for part in lengths]).tolist())) > 1
    assert all(kind == "projection" for kind, part in zip(numbers["output_norm"], numbers["lengths"]) if part is not None)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 14])
@pytest.mark.parametrize("method", ["global", "hybridkv"])
def test_a_prompt_within_the_window_or_the_budget_is_kept_whole(method, length):
    model, prompts = zoo.build("llama", "sdpa"), zoo.inputs("llama", length)
    cache = mixkv.MixKVCache(model, **OPTIONS | {"method": method})
    _, logits = oracle.generate(model, prompts, 4, past_key_values=cache)
    _, full_logits = oracle.generate(model, prompts, 4)
    torch.testing.assert_close(logits, full_logits)
    assert all((lengths == length + 3).all() for lengths in cache.stats()["lengths"])


def test_chunks_turns_and_copies(name="llama"):
    model = zoo.build(name, "sdpa")
    prompts = zoo.inputs(name, 60)
    whole, chunked = mixkv.MixKVCache(model, **OPTIONS), mixkv.MixKVCache(model, **OPTIONS)
    tokens, _ = oracle.generate(model, prompts, 5, past_key_values=whole)
    assert torch.equal(oracle.generate(model, prompts, 5, past_key_values=chunked, prefill_chunk_size=16)[0], tokens)
    assert rows_per_layer(whole) == rows_per_layer(chunked)
    assert whole._state.shared_budget is None
    second = torch.cat([prompts["input_ids"], tokens, prompts["input_ids"][:, :9]], dim=1)
    before = rows_per_layer(whole)
    copies = [whole, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))]
    answers = [
        model.generate(second, attention_mask=torch.ones_like(second), past_key_values=cache, max_new_tokens=4, do_sample=False)
        for cache in copies
    ]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    heads = whole.stats()["lengths"][0].numel()
    assert [after - held for after, held in zip(rows_per_layer(whole), before)] == [heads * (1 + 9 + 3)] * len(before)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_drafts_that_arrive_with_the_prompt(name):
    """They are declined: the tokens are those of greedy decoding, and so are the rows of the prompt."""
    model = zoo.build(name, "sdpa")
    for seed in range(6):
        prompts = zoo.inputs(name, 60 + seed)
        columns = prompts["input_ids"].shape[1]
        greedy, drafted = mixkv.MixKVCache(model, **OPTIONS), mixkv.MixKVCache(model, **OPTIONS)
        tokens = model.generate(**prompts, past_key_values=greedy, max_new_tokens=8, do_sample=False)
        out = model.generate(**prompts, past_key_values=drafted, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(out, tokens) and drafted._state.shared_budget is None
        for layer in range(len(greedy.layers)):
            for mine, expected in zip(drafted.kept(layer)[0], greedy.kept(layer)[0], strict=True):
                assert torch.equal(mine[mine < columns], expected[expected < columns])


def test_sampling_with_an_assistant_goes_on(name="llama"):
    model = zoo.build(name, "sdpa")
    prompts = zoo.inputs(name, 60)
    torch.manual_seed(0)
    cache = mixkv.MixKVCache(model, **OPTIONS)
    out = model.generate(
        **prompts, past_key_values=cache, max_new_tokens=8, do_sample=True, assistant_model=zoo.build(name, "sdpa")
    )
    assert out.min() >= 0 and out.shape[1] > 60


def test_decode_budget_keeps_the_layers_shares(name="llama"):
    model = zoo.build(name, "sdpa")
    prompts = zoo.inputs(name, 60)
    cache = mixkv.MixKVCache(model, **OPTIONS, decode_budget=20, decode_slack=4)
    oracle.generate(model, prompts, 40, past_key_values=cache)
    shares = [layer.share[0] for layer in cache.layers]
    assert abs(sum(shares) / len(shares) - 1) < 1e-6 and max(shares) > 1
    for layer, share, rows in zip(cache.layers, shares, rows_per_layer(cache)):
        assert rows <= (max(round(20 * share), 7) + 4 + 1) * layer.store.heads


def test_a_saved_cache_keeps_its_shares(tmp_path, name="llama"):
    model = zoo.build(name, "sdpa")
    prompts = zoo.inputs(name, 60)
    cache = mixkv.MixKVCache(model, **OPTIONS, decode_budget=20, decode_slack=4)
    tokens, _ = oracle.generate(model, prompts, 1, past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = mixkv.MixKVCache.load(tmp_path / "cache", model)
    assert loaded.stats()["output_norm"] == cache.stats()["output_norm"]
    turn = {"input_ids": torch.cat([prompts["input_ids"], tokens], dim=1)}
    turn["attention_mask"] = torch.ones_like(turn["input_ids"])
    answers = [oracle.generate(model, turn, 40, past_key_values=held)[1] for held in (cache, loaded)]
    assert torch.equal(*answers)
    assert rows_per_layer(cache) == rows_per_layer(loaded)
