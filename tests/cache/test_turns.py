"""Later turns are compressed: a query sees exactly what had not been evicted before it."""

import contextlib
import copy
import pickle

import pytest
import torch
import transformers
from support import oracle, zoo
from support.configs import options_for

import mixkv
from mixkv import registry

SMALL = dict(budget=14, window=6, kernel_size=3, pyramid_beta=4)
METHODS = [name for name, method in registry.METHODS.items() if method.turns]
LENGTH, TURN, STEPS = 48, 29, 4
LOOKUP = dict(prompt_lookup_num_tokens=5)


def text(batch, length, seed=5):
    return torch.randint(zoo.TEXT.start, zoo.TEXT.stop, (batch, length), generator=torch.Generator().manual_seed(seed))


def after(prompts, answer, turn):
    """What `generate` is given for the next turn."""
    ids = torch.cat([prompts["input_ids"], answer, turn], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def conversation(model, prompts, turns, cache, times=None, **options):
    """Logits and tokens of a generation after ``prompts`` and after each of ``turns``."""
    found, prompt = [], prompts
    for turn in [None, *turns]:
        if turn is not None:
            prompt = after(prompt, found[-1][0], turn)
        found.append(oracle.generate(model, prompt, STEPS, past_key_values=cache, **options))
        if times is not None:
            times.note(prompt["input_ids"].shape[1])
    return found


def check_against_oracle(model, prompts, turns, cache, **options):
    times = oracle.EvictionTimes(cache, prompts["input_ids"].shape[0])
    found = conversation(model, prompts, turns, cache, times, **options)
    mixkv.unpatch(model)
    with oracle.masked_by_time(model, times.layers):
        expected = conversation(model, prompts, turns, transformers.DynamicCache(config=model.config))
    for (tokens, logits), (expected_tokens, expected_logits) in zip(found, expected):
        assert (logits - expected_logits).abs().max() <= 1e-4
        assert torch.equal(tokens, expected_tokens)
    return times.layers


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("method", ["snapkv", "global"])
@pytest.mark.parametrize("name, attn", zoo.cases())
def test_turns_equal_masked_full_cache(name, attn, method, turns):
    model = zoo.build(name, attn)
    cache = mixkv.MixKVCache(model, **options_for(method, model), turns=turns, **SMALL)
    layers = check_against_oracle(model, zoo.inputs(name, LENGTH, batch=2), [text(2, TURN)], cache)
    held = [lengths for lengths in cache.stats()["lengths"] if lengths is not None]
    mean = sum(lengths.float().mean() for lengths in held) / len(held)
    # The prompt's budget, its answer, then the turn with the last token of the answer; or all of them within one budget.
    assert mean == (2 * SMALL["budget"] + 2 * (STEPS - 1) if turns == "each" else SMALL["budget"] + STEPS - 1)
    evicted = [((part > LENGTH) & (part != oracle.NEVER)).sum() for part in layers if part is not None]
    assert sum(evicted) > 0


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_turns_of_different_lengths(method, turns):
    """Turns within the window, within the budget and beyond it; one of a single token beside the answer's last."""
    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, **options_for(method, model), turns=turns, **SMALL)
    turns = [text(2, length, seed=length) for length in (25, 1, 5, 9, 40)]
    check_against_oracle(model, zoo.inputs("llama", LENGTH, batch=2), turns, cache)


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("method", ["adakv", "global"])
def test_a_share_of_each_turn_is_kept(method, turns):
    if turns == "all":
        with pytest.raises(ValueError, match="budget=0.25 is a share of a prompt, and turns='all' needs a bound"):
            mixkv.MixKVConfig(method=method, turns=turns, budget=0.25)
        return
    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, method=method, turns=turns, window=6, budget=0.25)
    check_against_oracle(model, zoo.inputs("llama", LENGTH, batch=2), [text(2, 39)], cache)
    # A quarter of 48, the answer, a quarter of 39 with the answer's last token, the answer.
    lengths = torch.stack(cache.stats()["lengths"]).float()
    assert lengths.mean() == 12 + 3 + 10 + 3


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_padded_turns_equal_rows_alone(method, turns):
    model = zoo.build("llama")
    batch, rows = zoo.ragged("llama", [48, 41])
    options = options_for(method, model) | dict(turns=turns) | SMALL
    lengths = [[33, 24], [4, 19]]
    added = [[text(1, n, seed=n) for n in turn] for turn in lengths]
    places = batch["attention_mask"].cumsum(1) - 1
    with torch.no_grad():
        together = mixkv.MixKVCache(model, **options)
        alone = [mixkv.MixKVCache(model, **options) for _ in rows]
        model(**batch, past_key_values=together, position_ids=places.clamp(min=0))
        expected = [model(**row, past_key_values=cache).logits[:, -1] for row, cache in zip(rows, alone)]
        mask = batch["attention_mask"]
        for turn in added:
            longest = max(part.shape[1] for part in turn)
            block = torch.cat([torch.nn.functional.pad(part, (longest - part.shape[1], 0)) for part in turn])
            mask = torch.cat([mask, (block > 0).long()], 1)
            places = mask.cumsum(1) - 1
            at = places[:, -longest:].clamp(min=0)
            out = model(input_ids=block, attention_mask=mask, past_key_values=together, position_ids=at).logits[:, -1]
            expected = [model(input_ids=part, past_key_values=cache).logits[:, -1] for part, cache in zip(turn, alone)]
            assert (out - torch.cat(expected)).abs().max() < 1e-4
    for row in range(2):
        for layer in range(3):
            for kept, own in zip(together.kept(layer)[row], alone[row].kept(layer)[0], strict=True):
                assert places[row][kept.long()].tolist() == own.tolist()


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("method", ["snapkv", "global"])
@pytest.mark.parametrize("chunk", [1, 5, 16, 40])
def test_a_turn_in_chunks_is_one_turn(method, turns, chunk):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", LENGTH, batch=2)
    options = dict(method=method, turns=turns, **SMALL)
    whole, chunked = mixkv.MixKVCache(model, **options), mixkv.MixKVCache(model, **options)
    expected = conversation(model, prompts, [text(2, TURN), text(2, TURN, 6)], whole)
    found = conversation(model, prompts, [text(2, TURN), text(2, TURN, 6)], chunked, prefill_chunk_size=chunk)
    for (_, logits), (_, expected_logits) in zip(found, expected):
        assert (logits - expected_logits).abs().max() < 1e-4
    for layer in range(3):
        for row, expected_row in zip(chunked.kept(layer), whole.kept(layer)):
            assert all(map(torch.equal, row, expected_row))


def test_chunks_of_ones_own_need_the_length():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", LENGTH)
    options = dict(turns="each", **SMALL)
    whole, chunked = mixkv.MixKVCache(model, **options), mixkv.MixKVCache(model, **options)
    turn = text(1, TURN)
    with torch.no_grad():
        for cache in (whole, chunked):
            model(**prompts, past_key_values=cache)
        model(turn, past_key_values=whole)
        chunked.expect_prompt(TURN)
        for part in turn.split(8, dim=1):
            model(part, past_key_values=chunked)
            if part.shape[1] == 8:
                with pytest.raises(RuntimeError, match=r"expect_prompt\(5\) came after"):
                    chunked.expect_prompt(5)
                with pytest.raises(ValueError, match="cannot crop 3 tokens: the turn has not been read to its end"):
                    chunked.crop(-3)
                with pytest.raises(ValueError, match="its last turn ends after 77: save it once"):
                    chunked.save("/nowhere")
    assert [[len(head) for head in chunked.kept(layer)[0]] for layer in range(3)] == [
        [len(head) for head in whole.kept(layer)[0]] for layer in range(3)
    ]
    with pytest.raises(ValueError, match="cannot crop 3 tokens: only the 0 appended since the last compression"):
        chunked.crop(-3)


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("method", ["adakv", "global"])
@pytest.mark.parametrize("bound", [None, 24])
def test_assisted_decoding_gives_the_greedy_tokens_in_every_turn(method, turns, bound):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", LENGTH)
    prompts["input_ids"][:, -12:] = prompts["input_ids"][:, :12]
    turn = torch.cat([text(1, 20), prompts["input_ids"][:, :12]], dim=1)

    def two_turns(cache, **extra):
        tokens = model.generate(**prompts, max_new_tokens=12, do_sample=False, past_key_values=cache, **extra)
        ids = torch.cat([tokens, turn], dim=1)
        # With an assistant, transformers takes the ids of the new tokens alone.
        asked = {"input_ids": ids[:, cache.get_seq_length() :], "attention_mask": torch.ones_like(ids)}
        return model.generate(**asked, max_new_tokens=12, do_sample=False, past_key_values=cache, **extra)

    stock = [two_turns(transformers.DynamicCache(config=model.config), **extra) for extra in ({}, LOOKUP)]
    if not torch.equal(*stock):
        pytest.skip(f"transformers {transformers.__version__} decodes otherwise with an assistant after another turn")
    options = dict(method=method, turns=turns, decode_budget=bound, **SMALL)
    caches = [mixkv.MixKVCache(model, **options) for _ in range(2)]
    found = [two_turns(cache, **extra) for cache, extra in zip(caches, ({}, LOOKUP))]
    assert torch.equal(*found)
    if bound is None:
        for layer in range(3):
            assert all(map(torch.equal, *(cache.kept(layer)[0] for cache in caches)))


def test_drafts_of_ones_own_are_not_evicted():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", LENGTH)
    cache = mixkv.MixKVCache(model, turns="each", **SMALL)
    cache.activate_past_recording()
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        model(text(1, 20), past_key_values=cache)
        cache.crop(-20)
        assert cache.get_seq_length() == LENGTH
        cache.expect_prompt(20)
        model(text(1, 20), past_key_values=cache)
    assert torch.stack(cache.stats()["lengths"]).float().mean() == 2 * SMALL["budget"]


@pytest.mark.parametrize("method", ["adakv", "global"])
def test_all_that_is_held_stays_within_the_budget(method):
    model = zoo.build("llama")
    cache = mixkv.MixKVCache(model, method=method, turns="all", **SMALL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model(**zoo.inputs("llama", LENGTH), past_key_values=cache)
        for length in torch.randint(2, 60, (12,), generator=generator).tolist():
            model(text(1, length, seed=length), past_key_values=cache)
            lengths = torch.stack(cache.stats()["lengths"]).float()
            assert lengths.mean() == SMALL["budget"]


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("method", ["adakv", "global"])
def test_a_turn_under_a_decode_budget(method, turns):
    """The turn is compressed first, then what exceeds the decode budget."""
    model, prompts = zoo.build("llama"), zoo.inputs("llama", LENGTH, batch=2)
    cache = mixkv.MixKVCache(model, method=method, turns=turns, decode_budget=20, decode_slack=2, **SMALL)
    for generated in range(3):
        turn = prompts if generated == 0 else after(prompts, prompts["input_ids"][:, :0], text(2, TURN, generated))
        prompts = {"input_ids": model.generate(**turn, max_new_tokens=20, do_sample=False, past_key_values=cache)}
        assert torch.stack(cache.stats()["lengths"]).float().mean() <= 22


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("method", ["adakv", "global"])
def test_saved_between_turns(method, turns, tmp_path):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", LENGTH, batch=2)
    cache = mixkv.MixKVCache(model, method=method, turns=turns, **SMALL)
    first, _ = oracle.generate(model, prompts, STEPS, past_key_values=cache)
    cache.save(tmp_path / "cache")
    copies = [cache, mixkv.MixKVCache.load(tmp_path / "cache", model), pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)]
    found = []
    for one in copies:
        answer = oracle.generate(model, after(prompts, first, text(2, TURN)), STEPS, past_key_values=one)
        found.append((answer[1], one.kept(1)))
    for logits, kept in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert all(torch.equal(*heads) for rows in zip(kept, found[0][1]) for heads in zip(*rows))


def test_a_failed_turn_can_be_read_again():
    model, prompts = zoo.build("llama"), zoo.inputs("llama", LENGTH)
    cache, turn = mixkv.MixKVCache(model, turns="all", **SMALL), text(1, TURN)
    first = model.model.layers[0].self_attn
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        cache.expect_prompt(TURN)
        handle = first.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
        with pytest.raises(KeyError):
            model(turn[:, :10], past_key_values=cache)
        handle.remove()
        for part in turn.split(10, dim=1):
            model(part, past_key_values=cache)
    assert torch.stack(cache.stats()["lengths"]).float().mean() == SMALL["budget"]


@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "idefics3", "gemma3_vision"])
def test_an_image_in_the_second_turn(name):
    model = zoo.build(name)
    prompts, more = zoo.inputs(name, LENGTH), zoo.inputs(name, LENGTH, seed=7)
    found = []
    cache = mixkv.MixKVCache(model, turns="each", **SMALL)
    times = oracle.EvictionTimes(cache, 1)
    for one in (cache, transformers.DynamicCache(config=model.config)):
        with torch.no_grad(), oracle.masked_by_time(model, times.layers) if found else contextlib.nullcontext():
            logits = [model(**prompts, past_key_values=one).logits[:, -1]]
            if one is cache:
                times.note(LENGTH)
            mask = torch.ones(1, 2 * LENGTH, dtype=torch.long)
            places = torch.arange(LENGTH, 2 * LENGTH).view(1, -1)
            logits.append(model(**(more | {"attention_mask": mask, "position_ids": places}), past_key_values=one).logits[:, -1])
            if one is cache:
                times.note(2 * LENGTH)
                assert sum(int(part.sum()) for part in cache.stats()["image_rows"] if part is not None) > 0
            logits.append(model(text(1, 1), past_key_values=one, position_ids=torch.tensor([[2 * LENGTH]])).logits[:, -1])
        found.append(logits)
        mixkv.unpatch(model)
    assert max((ours - theirs).abs().max() for ours, theirs in zip(*found)) < 1e-4


@pytest.mark.parametrize("turns", ["each", "all"])
@pytest.mark.parametrize("rows", ["int8", "int4"])
def test_turns_of_rows_in_fewer_bits(rows, turns):
    """As many rows as in the model's dtype, each of the right token; packed rows in two stores are evicted from both."""
    model = zoo.build("llama")
    kept = []
    for form in (rows, "model"):
        cache = mixkv.MixKVCache(model, method="global", turns=turns, **({} if form == "model" else {"rows": form}), **SMALL)
        conversation(model, zoo.inputs("llama", LENGTH, batch=2), [text(2, TURN), text(2, 40, 6)], cache)
        kept.append([cache.kept(layer) for layer in range(3)])
    count = [[sum(len(head) for layer in one for head in layer[row]) for row in range(2)] for one in kept]
    assert count[0] == count[1]
    for layer in kept[0]:
        for row in layer:
            assert all(
                (head[1:] > head[:-1]).all() and head[-STEPS + 1 :].tolist()[-1] == int(kept[1][0][0][0][-1]) for head in row
            )
