"""What rows were worth at earlier evictions of a generation counts, whatever order, batch or copy they are in."""

import copy
import pickle

import pytest
import torch
from support import zoo

import mixkv
from mixkv.cache.row_scores import RunningImportance

OPTIONS = dict(budget=14, window=6, decode_budget=18, decode_slack=4)


def plain(evictions, decay):
    """Means by position after ``evictions``, each a dict of position to score."""
    means = {}
    for scores in evictions:
        means = {at: decay * means[at] + (1 - decay) * score if at in means else score for at, score in scores.items()}
    return means


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_means_are_those_of_plain_arithmetic(decay):
    generator = torch.Generator().manual_seed(0)
    running = RunningImportance.empty(2, 3, torch.device("cpu"))
    held = {(row, head): [] for row in range(2) for head in range(3)}
    for step in range(5):
        position = torch.full((2, 3, 12), -1, dtype=torch.int32)
        score = torch.full((2, 3, 12), -torch.inf)
        for (row, head), history in held.items():
            # Some of the rows of the step before, and new ones.
            places = sorted({at for at in (history[-1] if history else {}) if torch.rand((), generator=generator) < 0.6})
            places = (places + list(range(10 * step, 10 * step + 4 + head)))[-12:]
            values = torch.rand(len(places), generator=generator) + 0.1
            position[row, head, 12 - len(places) :] = torch.tensor(places, dtype=torch.int32)
            score[row, head, 12 - len(places) :] = values
            history.append(dict(zip(places, values.tolist())))
        found, importance = running.revise(position, torch.tensor([True, True]), decay, score, 2 * score)
        for (row, head), history in held.items():
            there = position[row, head] >= 0
            expected = plain(history, decay)
            mean = [expected[at] for at in position[row, head][there].tolist()]
            torch.testing.assert_close(found[row, head][there], torch.tensor(mean))
            torch.testing.assert_close(importance[row, head][there], 2 * torch.tensor(mean))
            assert found[row, head][~there].isneginf().all()


def test_a_batch_row_that_loses_nothing_keeps_its_means():
    running = RunningImportance.empty(2, 1, torch.device("cpu"))
    position = torch.tensor([[[3, 5]], [[4, 9]]], dtype=torch.int32)
    score = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    running.revise(position, torch.tensor([True, True]), 0.5, score, score)
    running.revise(position, torch.tensor([True, False]), 0.5, 3 * score, score)
    assert running.score.tolist() == [[[2.0, 4.0]], [[3.0, 4.0]]]


@pytest.mark.parametrize("method", ["snapkv", "adakv", "global"])
def test_rows_copies_and_files_go_on_alike(method, tmp_path):
    model = zoo.build("llama")
    prompts = [zoo.inputs("llama", 40, seed=seed) for seed in range(2)]
    more = torch.randint(4, 100, (2, 60), generator=torch.Generator().manual_seed(3))
    together = mixkv.MixKVCache(model, method=method, **OPTIONS)
    alone = [mixkv.MixKVCache(model, method=method, **OPTIONS) for _ in prompts]
    with torch.no_grad():
        model(torch.cat([prompt["input_ids"] for prompt in prompts]), past_key_values=together)
        for prompt, cache in zip(prompts, alone):
            model(prompt["input_ids"], past_key_values=cache)
        for step in range(60):
            if step == 30:
                together.save(tmp_path / "cache")
                together = mixkv.MixKVCache.load(tmp_path / "cache", model)
            if step == 40:
                together = pickle.loads(pickle.dumps(copy.deepcopy(together)))
                together.reorder_cache(torch.tensor([1, 0]))
                alone, more = alone[::-1], more.flip(0)
            logits = model(more[:, step : step + 1], past_key_values=together).logits
            for row, cache in enumerate(alone):
                expected = model(more[row : row + 1, step : step + 1], past_key_values=cache).logits
                assert (logits[row] - expected[0]).abs().max() < 1e-4
    for layer in range(3):
        for row in range(2):
            assert all(map(torch.equal, together.kept(layer)[row], alone[row].kept(layer)[0]))


def test_the_last_queries_decide_alone_without_decay():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 40)
    kept = []
    for decay in (0.0, 0.5):
        cache = mixkv.MixKVCache(model, decode_decay=decay, **OPTIONS)
        model.generate(**prompts, max_new_tokens=80, min_new_tokens=80, do_sample=False, past_key_values=cache)
        assert (cache.layers[0].running is None) == (decay == 0)
        kept.append([cache.kept(layer)[0] for layer in range(3)])
    assert any(not torch.equal(*heads) for layer in zip(*kept) for heads in zip(*layer))
