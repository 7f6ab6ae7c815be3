"""score="replay": what a model attends to while it repeats the prompt, by transformers' own attention over all of it."""

import copy

import pytest
import torch
import transformers
from support import oracle, zoo

import mixkv
from mixkv.cache.layer import MixKVLayer
from mixkv.cache.parts import WholePrompt
from mixkv.cache.replay import CUE
from mixkv.hf.versions import cache_argument
from mixkv.selection.context import FIRST

OPTIONS = dict(score="replay", method="global", budget=14, window=6)
STEPS = 4
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss"]


class Watched(mixkv.MixKVCache):
    """A cache that keeps what its replay measured, by layer."""

    class layer_class(MixKVLayer):
        def compress(self, *args, measured=None):
            if measured is not None:
                self.measured = measured.replay
            super().compress(*args, measured=measured)

        def compress_replayed(self):
            if self.prompt.before:
                self.measured = self.prompt.replay[:, :, self.prompt.before :]
            super().compress_replayed()

    @property
    def measured(self):
        return [layer.measured if isinstance(layer, MixKVLayer) else None for layer in self.layers]


def read(model, prompts, **options):
    """A watched cache that `generate` has read a prompt with."""
    cache = Watched(model, **OPTIONS | options)
    model.generate(**prompts, max_new_tokens=1, do_sample=False, **cache_argument(cache))
    return cache


def expected(model, ids, size, first=0):
    """By layer float32 [Hkv, N]: prompt ids [1, N] in parts of at most ``size`` tokens, each repeated in a forward of its own
    over the whole prompt, in which a mask hides what it is not to see. Of a later turn, which begins at ``first``, likewise."""
    length = ids.shape[1]
    count = -(-(length - first) // size)
    step = -(-(length - first) // count)
    found = None
    for begin in range(first, length, step):
        end = min(begin + step, length)
        again = torch.arange(begin - min(CUE, step) if begin > first else first, end)
        shown = torch.zeros(length, dtype=torch.bool)
        shown[begin:end] = shown[:FIRST] = True
        rows = torch.arange(length + len(again))
        causal = rows[None, :] <= rows[:, None]
        full = causal.clone()
        full[length:, :length] &= shown
        masks = {"full_attention": full, "sliding_attention": causal & (rows[:, None] - rows[None, :] < zoo.WINDOW)}
        masks = {name: torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None] for name, mask in masks.items()}
        kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
        mask = masks if "sliding_attention" in kinds else masks["full_attention"]
        decoder = model.get_decoder()
        weights = decoder(
            input_ids=torch.cat([ids, ids[:, again]], dim=1),
            attention_mask=mask,
            position_ids=rows[None],
            output_attentions=True,
        ).attentions
        heads = decoder.config.num_key_value_heads
        best = [
            part[0, :, length + len(again) - (end - begin) :, :length].unflatten(0, (heads, -1)).amax(dim=(1, 2))
            for part in weights
        ]
        best = [part.where(shown, 0.0) for part in best]
        found = best if found is None else [one.maximum(other) for one, other in zip(found, best)]
    if first:
        return [part[:, first:] for part in found]
    for part in found:
        part[:, :FIRST] = 1.0
    return found


@pytest.mark.parametrize("size", [100, 17])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_replay_measures_what_a_forward_over_everything_attends_to(name, size):
    model = zoo.build(name, "eager")
    ids = zoo.inputs(name, 47)["input_ids"]
    cache = read(model, {"input_ids": ids}, replay_chunk=size)
    mixkv.unpatch(model)
    for mine, theirs in zip(cache.measured, expected(model, ids, size), strict=True):
        if mine is not None:
            torch.testing.assert_close(mine[0], theirs, atol=2e-6, rtol=1e-5)


def given_to_decoder(model, prompts):
    """The arguments of the decoder while `generate` reads a prompt."""
    given = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    model.generate(**prompts, max_new_tokens=1, do_sample=False)
    hook.remove()
    return given


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3_vision"])
@torch.no_grad()
def test_images_are_replayed_as_embeddings_at_positions_after_the_prompt(name):
    model = zoo.build(name, "eager")
    prompts = zoo.inputs(name, zoo.FAMILIES[name].min_length + 20)
    cache = read(model, prompts)
    mixkv.unpatch(model)
    given = given_to_decoder(model, prompts)
    embedded, positions = given["inputs_embeds"], given["position_ids"]
    length = embedded.shape[1]
    rows = torch.arange(2 * length)
    causal = rows[None, :] <= rows[:, None]
    masks = {"full_attention": causal, "sliding_attention": causal & (rows[:, None] - rows[None, :] < zoo.WINDOW)}
    masks = {kind: torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None] for kind, mask in masks.items()}
    if isinstance(given["attention_mask"], dict):
        for kind, mask in given["attention_mask"].items():
            masks[kind][..., :length, :length] = mask
    # The first of four rows are positions in the text, the others those of the rotary embedding.
    parts = positions.split([1, 3]) if positions.shape[0] == 4 else [positions]
    arguments = {
        "inputs_embeds": torch.cat([embedded, embedded], dim=1),
        "position_ids": torch.cat([torch.cat([part, part - part.min() + part.max() + 1], dim=-1) for part in parts]),
        "attention_mask": masks if isinstance(given["attention_mask"], dict) else masks["full_attention"],
    }
    if "deepstack_visual_embeds" in given:
        arguments["visual_pos_masks"] = given["visual_pos_masks"].repeat(1, 2)
        arguments["deepstack_visual_embeds"] = [part.repeat(2, 1) for part in given["deepstack_visual_embeds"]]
    weights = model.get_decoder()(**arguments, output_attentions=True).attentions
    for mine, part in zip(cache.measured, weights, strict=True):
        if mine is not None:
            theirs = part[0, :, length:, :length].unflatten(0, (mine.shape[1], -1)).amax(dim=(1, 2))
            theirs[:, :FIRST] = 1.0
            torch.testing.assert_close(mine[0], theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, "qwen2_vl", "qwen3_vl", "llava", "mllama"])
def test_a_padded_batch_is_replayed_as_its_rows_alone(name):
    model = zoo.build(name, zoo.FAMILIES[name].attn[-1])
    least = zoo.FAMILIES[name].min_length
    batch, rows = zoo.ragged(name, [least + 34, least + 11, least + 27])
    cache = read(model, batch, replay_chunk=20)
    for index, prompt in enumerate(rows):
        alone = read(model, prompt, replay_chunk=20)
        pad = batch["input_ids"].shape[1] - prompt["input_ids"].shape[1]
        for mine, theirs in zip(cache.measured, alone.measured, strict=True):
            if mine is not None:
                torch.testing.assert_close(mine[index, :, pad:], theirs[0], atol=1e-5, rtol=1e-4)
                assert not mine[index, :, :pad].any()
        oracle.assert_keeps_as_alone(cache, index, alone, pad)


@pytest.mark.parametrize("name", [*FAMILIES, "qwen2_vl", "gemma3_vision"])
def test_decode_after_a_replay_equals_a_masked_full_cache(name):
    model = zoo.build(name, zoo.FAMILIES[name].attn[-1])
    prompts = zoo.inputs(name, zoo.FAMILIES[name].min_length + 30, batch=2)
    columns = prompts["input_ids"].shape[1]
    cache = mixkv.MixKVCache(model, **OPTIONS, replay_chunk=20)
    tokens, logits = oracle.generate(model, prompts, STEPS, **cache_argument(cache))
    masks = oracle.keep_masks(cache, columns, batch=2)
    assert any(mask is not None and mask.sum() < mask.numel() for mask in masks)
    mixkv.unpatch(model)
    with oracle.masked(model, masks, columns):
        masked_tokens, masked_logits = oracle.generate(model, prompts, STEPS)
    assert (logits - masked_logits).abs().max() <= 1e-4
    assert torch.equal(tokens, masked_tokens)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_read_in_several_forwards_is_replayed_whole(name):
    model = zoo.build(name, "sdpa")
    prompts, _ = zoo.ragged(name, [50, 41])
    whole, parts = read(model, prompts, replay_chunk=16), Watched(model, **OPTIONS, replay_chunk=16)
    model.generate(**prompts, max_new_tokens=1, do_sample=False, prefill_chunk_size=13, **cache_argument(parts))
    for mine, theirs in zip(parts.measured, whole.measured, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_the_forwards_of_a_replay_are_as_many_and_as_large_as_its_parts():
    model = zoo.build("llama", "sdpa")
    sizes = []

    def count(module, args, kwargs):
        sizes.append(kwargs["input_ids"].shape[1])

    for length in (80, 160, 320):
        sizes.clear()
        with torch.no_grad():
            cache = Watched(model, **OPTIONS, replay_chunk=40)
            handle = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
            model(input_ids=zoo.inputs("llama", length)["input_ids"], **cache_argument(cache))
            handle.remove()
        assert sizes == [length, 40, *[40 + CUE] * (length // 40 - 1)]


def test_after_a_replay_nothing_of_it_is_held():
    model = zoo.build("gemma3", "sdpa")
    prompts = zoo.inputs("gemma3", 60)
    cache = read(model, prompts)
    other = mixkv.MixKVCache(model, **OPTIONS | dict(score="mix-output"))
    model.generate(**prompts, max_new_tokens=1, do_sample=False, **cache_argument(other))
    assert cache.get_seq_length() == other.get_seq_length() == 60
    assert not any(isinstance(getattr(layer, "prompt", None), WholePrompt) for layer in cache.layers)
    for mine, theirs in zip(cache.layers, other.layers):
        if not isinstance(mine, MixKVLayer):
            assert torch.equal(mine.keys, theirs.keys) and mine.cumulative_length == theirs.cumulative_length
    assert not model.get_decoder()._forward_hooks and not model.get_decoder()._forward_pre_hooks


def test_a_copy_made_before_and_after_the_prompt_goes_on_alike():
    model = zoo.build("llama", "sdpa")
    prompts = zoo.inputs("llama", 60)
    empty = mixkv.MixKVCache(model, **OPTIONS)
    first, second = copy.deepcopy(empty), empty
    results = []
    for cache in (first, second):
        model.generate(**prompts, max_new_tokens=1, do_sample=False, **cache_argument(cache))
        results.append(cache.kept(1)[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_exception_in_a_replay_breaks_the_cache_until_reset(monkeypatch):
    model = zoo.build("llama", "sdpa")
    prompts = zoo.inputs("llama", 60)
    cache = mixkv.MixKVCache(model, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(MixKVLayer, "replay", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(**prompts, max_new_tokens=1, **cache_argument(cache))
    assert not cache.usable
    with pytest.raises(RuntimeError, match="replay of a prompt"):
        model(input_ids=prompts["input_ids"][:, :1], **cache_argument(cache))
    with pytest.raises(RuntimeError, match="reset"):
        cache.stats()
    cache.reset()
    model.generate(**prompts, max_new_tokens=2, **cache_argument(cache))
    assert cache.stats()["score"] == "replay"


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("size", [100, 17])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_later_turn_is_replayed_by_itself(name, size, turns):
    model = zoo.build(name, "eager")
    ids = zoo.inputs(name, 90)["input_ids"]
    # Nothing of the prompt is evicted before the turn has been measured.
    cache = Watched(model, score="replay", turns=turns, budget=36, window=6, replay_chunk=size)
    mixkv.read(model, input_ids=ids[:, :35], cache=cache)
    before = [None if layer is None else layer.clone() for layer in cache.measured]
    mixkv.read(model, input_ids=ids[:, 35:], cache=cache)
    mixkv.unpatch(model)
    for mine, theirs in zip(cache.measured, expected(model, ids, size, first=35), strict=True):
        if mine is not None:
            torch.testing.assert_close(mine[0], theirs, atol=2e-6, rtol=1e-5)
    if turns == "all":
        layers = [layer for layer in cache.layers if hasattr(layer, "scores")]
        for layer, old, new in zip(layers, filter(torch.is_tensor, before), filter(torch.is_tensor, cache.measured)):
            every = torch.cat([old, new], dim=2)[0]
            at, scores = layer.scores.position[0], layer.scores.score[0]
            assert torch.equal(scores[at >= 0], every.gather(1, at.clamp(min=0).long())[at >= 0])
            assert [int(count) for count in (at >= 0).sum(dim=-1)] >= [len(head) for head in layer.kept()[0]]


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_vl"])
def test_pages_are_read_one_after_the_other(name, turns):
    """What queries see is what had not been evicted; a page in several forwards and a padded one are read as if in one, and alone."""
    model = zoo.build(name, zoo.FAMILIES[name].attn[-1])
    options = dict(score="replay", turns=turns, budget=14, window=6, replay_chunk=20)
    pages = [
        zoo.inputs(name, 40, seed=seed) if seed == 0 else zoo.inputs(name, 25 + seed, seed=seed, images=False)
        for seed in range(3)
    ]
    cache, times = mixkv.MixKVCache(model, **options), None
    times = oracle.EvictionTimes(cache, 1)
    for page in pages:
        mixkv.read(model, **page, cache=cache)
        times.note(cache.get_seq_length())
    stored = torch.stack([part for part in cache.stats()["lengths"] if part is not None]).float().mean()
    assert stored == (14 if turns == "all" else 3 * 14)
    last = torch.tensor([[7, 8, 9]])
    stock = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(last, **cache_argument(copy.deepcopy(cache))).logits
        mixkv.unpatch(model)
        with oracle.masked_by_time(model, times.layers):
            for page in pages:
                ids = {name: value for name, value in page.items() if name != "attention_mask"}
                model(**ids, **cache_argument(stock))
            expected_logits = model(last, **cache_argument(stock)).logits
    assert (logits - expected_logits).abs().max() < 1e-4


@pytest.mark.parametrize("turns", ["each", "all"])
def test_a_padded_page_is_read_as_its_rows_alone(turns):
    model = zoo.build("llama")
    options = dict(score="replay", turns=turns, budget=14, window=6, replay_chunk=20)
    batch, rows = zoo.ragged("llama", [40, 31])
    more, more_rows = zoo.ragged("llama", [33, 44], seed=5)
    mask = torch.cat([batch["attention_mask"], more["attention_mask"]], dim=1)
    together = mixkv.read(model, **batch, **options)
    mixkv.read(model, input_ids=more["input_ids"], attention_mask=mask, cache=together)
    places = mask.cumsum(1) - 1
    for row in range(2):
        alone = mixkv.read(model, **rows[row], **options)
        mixkv.read(model, **more_rows[row], cache=alone)
        for layer in range(3):
            for kept, own in zip(together.kept(layer)[row], alone.kept(layer)[0], strict=True):
                assert places[row][kept.long()].tolist() == own.tolist()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_replay_window_adds_what_the_window_attends_to(name):
    model = zoo.build(name, "eager")
    ids = zoo.inputs(name, 47)["input_ids"]
    options = OPTIONS | dict(method="snapkv", score="replay-window")
    cache = Watched(model, **options)
    model(input_ids=ids, **cache_argument(cache))
    mixkv.unpatch(model)
    window, candidates = OPTIONS["window"], 47 - OPTIONS["window"]
    weights = model.get_decoder()(input_ids=ids, output_attentions=True).attentions
    for index, (mine, part) in enumerate(zip(cache.measured, weights, strict=True)):
        if mine is not None:
            attended = part[0, :, -window:, :candidates].unflatten(0, (mine.shape[1], -1)).amax(dim=(1, 2))
            best = (mine[0, :, :candidates] + 8 * attended).topk(OPTIONS["budget"] - window).indices.sort().values
            for positions, expected_positions in zip(cache.kept(index)[0], best, strict=True):
                assert positions[:-window].tolist() == expected_positions.tolist()


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_while_a_prompt_is_replayed_the_full_cache_is_held_and_little_more(name, monkeypatch):
    model = zoo.build(name, "sdpa")
    prompts = zoo.inputs(name, 160)
    held, full = [], []
    replay = MixKVLayer.replay

    def watch(self, *arguments):
        held.append(self.prompt.nbytes)
        full.append(self.nbytes_full)
        return replay(self, *arguments)

    monkeypatch.setattr(MixKVLayer, "replay", watch)
    read(model, prompts)
    # Beside keys and values: the window's queries and outputs, and a number for each token of a head.
    heads, size = model.get_decoder().config.num_attention_heads, model.get_decoder().config.head_dim
    extra = 4 * (2 * OPTIONS["window"] * heads * size + 160 * heads)
    assert held and max(mine - whole for mine, whole in zip(held, full)) <= extra


def test_beams_go_on_from_a_replayed_prompt():
    model = zoo.build("llama", "sdpa")
    prompts, _ = zoo.ragged("llama", [50, 41])
    cache = mixkv.MixKVCache(model, **OPTIONS)
    single = mixkv.MixKVCache(model, **OPTIONS)
    found = oracle.beams(model, prompts, cache)
    oracle.generate(model, prompts, 1, **cache_argument(single))
    assert found.sequences.shape[0] == 2
    for row in range(2):
        for mine, theirs in zip(cache.kept(0)[4 * row], single.kept(0)[row], strict=True):
            assert torch.equal(mine[mine < 50], theirs)
