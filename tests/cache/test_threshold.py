"""Caches with budget="auto": the entries whose score exceeds the threshold, in every way a cache is used."""

import copy
import pickle

import pytest
import torch
from support import oracle, zoo

import mixkv
from mixkv import checked_file
from mixkv.cache import save
from mixkv.cache.layer import MixKVLayer
from mixkv.hf.versions import cache_argument

OPTIONS = dict(score="replay", budget="auto", threshold=0.3, window=6, replay_chunk=20)
STEPS = 4


class Watched(mixkv.MixKVCache):
    """A cache that keeps what its replays measured, and of which no layer may evict an entry that it has kept."""

    class layer_class(MixKVLayer):
        measured = None

        def compress_replayed(self):
            self.measured = self.prompt.measured().replay[:, :, self.prompt.before :]
            super().compress_replayed()

        def evict(self, ranks, rows):
            raise AssertionError("the layers of a threshold share nothing")

    @property
    def watched(self):
        return [layer for layer in self.layers if isinstance(layer, MixKVLayer)]


def chosen(measured, first, real):
    """Positions by head that are to be kept of the last ``real`` tokens, of which ``measured`` [Hkv, N] has scores; N is ``first``
    tokens after the start."""
    length = measured.shape[1]
    candidates = range(length - real, length - OPTIONS["window"])
    window = list(range(max(length - OPTIONS["window"], length - real), length))
    return [
        [first + at for at in [*(at for at in candidates if float(head[at]) > OPTIONS["threshold"]), *window]]
        for head in measured
    ]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", "qwen2_vl"])
def test_decode_equals_a_full_cache_with_masked_scores_below_the_threshold(name):
    model = zoo.build(name, zoo.FAMILIES[name].attn[-1])
    longest = zoo.FAMILIES[name].min_length + 34
    prompts, rows = zoo.ragged(name, [longest, longest - 11])
    cache = Watched(model, **OPTIONS)
    tokens, logits = oracle.generate(model, prompts, STEPS, **cache_argument(cache))
    for layer in cache.watched:
        for row, real in enumerate((longest, longest - 11)):
            kept = [head[head < longest].tolist() for head in layer.kept()[row]]
            assert kept == chosen(layer.measured[row], 0, real)
    masks = oracle.keep_masks(cache, longest, batch=2)
    ours = [mask for mask in masks if mask is not None]
    assert len({int(count) for mask in ours for count in mask.sum(dim=-1).flatten()}) > 1
    shares = [sum(int(mask[row].sum()) for mask in ours) / sum(mask.shape[1] for mask in ours) for row in range(2)]
    expected = [share / real for share, real in zip(shares, (longest, longest - 11))]
    assert cache.stats()["prompt_share"] == pytest.approx(expected) and max(expected) < 1
    for index, prompt in enumerate(rows):
        alone = Watched(model, **OPTIONS)
        oracle.generate(model, prompt, STEPS, **cache_argument(alone))
        oracle.assert_keeps_as_alone(cache, index, alone, longest - prompt["input_ids"].shape[1])
    mixkv.unpatch(model)
    with oracle.masked(model, masks, longest):
        masked_tokens, masked_logits = oracle.generate(model, prompts, STEPS)
    assert (logits - masked_logits).abs().max() <= 1e-4
    assert torch.equal(tokens, masked_tokens)


@torch.no_grad()
def test_copies_files_and_pieces_go_on_alike(tmp_path):
    model = zoo.build("llama")
    prompts, _ = zoo.ragged("llama", [50, 41])
    cache = mixkv.read(model, **prompts, **OPTIONS, refit=False)
    cache.save(tmp_path / "cache")
    others = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), mixkv.MixKVCache.load(tmp_path / "cache", model)]
    others.append(mixkv.MixKVCache(model, **OPTIONS))
    model.generate(**prompts, max_new_tokens=1, prefill_chunk_size=16, **cache_argument(others[-1]))
    token, mask = torch.tensor([[7], [8]]), torch.cat([prompts["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    expected = model(token, attention_mask=mask, **cache_argument(copy.deepcopy(cache))).logits
    for other in others:
        assert other.config == cache.config and mixkv.MixKVConfig.from_json(other.config.to_json()) == cache.config
        assert other.stats()["prompt_share"] == cache.stats()["prompt_share"]
        assert (model(token, attention_mask=mask, **cache_argument(other)).logits - expected).abs().max() < 1e-4
    shares = cache.stats()["prompt_share"]
    assert len(set(shares)) == 2
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.stats()["prompt_share"] == shares[::-1]
    cache.reset()
    assert cache.stats()["prompt_share"] is None


def test_a_damaged_share(tmp_path):
    model = zoo.build("llama")
    mixkv.read(model, **zoo.inputs("llama", 50), **OPTIONS).save(tmp_path / "whole")
    header, tensors = checked_file.read(tmp_path / "whole", range(save.FORMAT, save.FORMAT + 1))
    checked_file.write(tmp_path / "forged", header, tensors | {"1.kept_share": torch.ones(2)})
    with pytest.raises(ValueError, match="forged is damaged .layer 1 has"):
        mixkv.MixKVCache.load(tmp_path / "forged", model)


@pytest.mark.parametrize("rows", ["int8", "int4"])
def test_row_formats_hold_the_same_entries(rows):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 50)
    plain, coded = (mixkv.read(model, **prompts, **OPTIONS, rows=kind) for kind in ("full", rows))
    for layer in range(3):
        assert all(map(torch.equal, plain.kept(layer)[0], coded.kept(layer)[0]))


@torch.no_grad()
def test_every_turn_is_compared_with_the_threshold():
    model = zoo.build("llama")
    ids = zoo.inputs("llama", 90)["input_ids"]
    cache = Watched(model, **OPTIONS, turns="each")
    mixkv.read(model, input_ids=ids[:, :40], cache=cache)
    earlier = [[head.tolist() for head in layer.kept()[0]] for layer in cache.watched]
    share = cache.stats()["prompt_share"]
    assert share == pytest.approx([sum(len(head) for layer in earlier for head in layer) / (40 * sum(map(len, earlier)))])
    mixkv.read(model, input_ids=ids[:, 40:], cache=cache)
    for layer, before in zip(cache.watched, earlier, strict=True):
        assert layer.measured.shape[2] == 50
        expected = [old + new for old, new in zip(before, chosen(layer.measured[0], 40, 50))]
        assert [head.tolist() for head in layer.kept()[0]] == expected
    assert cache.stats()["prompt_share"] == share


@pytest.mark.parametrize("length", [3, 6, 7])
def test_prompts_about_as_long_as_the_window(length):
    model = zoo.build("llama")
    cache = mixkv.read(model, input_ids=zoo.inputs("llama", 40)["input_ids"][:, :length], **OPTIONS)
    assert all(len(head) == length for layer in range(3) for head in cache.kept(layer)[0])
    assert cache.stats()["prompt_share"] == [1.0]


def test_without_a_threshold_there_is_no_share():
    model = zoo.build("llama")
    assert mixkv.read(model, **zoo.inputs("llama", 40), budget=20, window=6).stats()["prompt_share"] is None
