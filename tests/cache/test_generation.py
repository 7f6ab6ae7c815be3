"""Every way of generating keeps to the compressed cache: each is compared with a plainer one."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from packaging.version import Version
from support import oracle, zoo

import mixkv

SMALL = dict(budget=14, window=6, kernel_size=3)
FAMILIES = ("llama", "qwen2", "gemma3", "qwen2_vl", "gpt_oss")


def build(name):
    return zoo.build(name, zoo.FAMILIES[name].attn[-1])


def prompts_for(name, batch=1, seed=0):
    return zoo.inputs(name, 48, batch=batch, seed=seed)


def skip_unless_stock_can(model, prompts, **options):
    """Skips where transformers' own cache raises or gives other tokens than plain greedy decoding."""
    plain = model.generate(**prompts, max_new_tokens=12, do_sample=False)
    try:
        same = torch.equal(model.generate(**prompts, max_new_tokens=12, do_sample=False, **options), plain)
    except Exception as error:
        pytest.skip(f"transformers {transformers.__version__} cannot: {error}")
    if not same:
        pytest.skip(f"transformers {transformers.__version__} decodes otherwise with {list(options)}")


def held(cache):
    return [layer if layer is None else layer.tolist() for layer in cache.stats()["lengths"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_patched_unbound_and_bound_caches_agree(name):
    prompts = prompts_for(name, 2)
    bare = oracle.generate(build(name), prompts, 6, past_key_values=mixkv.MixKVCache(**SMALL))
    model = build(name)
    bound = oracle.generate(model, prompts, 6, past_key_values=mixkv.MixKVCache(model, **SMALL))
    mixkv.unpatch(model)
    with mixkv.patched(model, **SMALL):
        patched = oracle.generate(model, prompts, 6)
    assert torch.equal(bare[1], bound[1]) and torch.equal(bare[1], patched[1])
    full = oracle.generate(model, prompts, 6)
    assert not torch.equal(full[1], patched[1])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk", [5, 16, 47, 48, 60])
@pytest.mark.parametrize("bind", ["bare", "patched"])
def test_chunked_prefill_compresses_once_after_the_last_chunk(name, chunk, bind):
    model, prompts = build(name), zoo.inputs(name, 48, batch=2, images=False)
    skip_unless_stock_can(model, prompts, prefill_chunk_size=chunk)
    whole, chunked = mixkv.MixKVCache(model, **SMALL), mixkv.MixKVCache(**SMALL)
    _, expected = oracle.generate(model, prompts, 4, past_key_values=whole)
    if bind == "patched":
        mixkv.patch(model, **SMALL)
        out = model.generate(
            **prompts,
            max_new_tokens=4,
            do_sample=False,
            prefill_chunk_size=chunk,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits, chunked = torch.stack(out.logits, dim=1), out.past_key_values
    else:
        mixkv.unpatch(model)
        _, logits = oracle.generate(model, prompts, 4, past_key_values=chunked, prefill_chunk_size=chunk)
    assert (logits - expected).abs().max() < 1e-4
    assert held(chunked) == held(whole)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("drafts", ["lookup", "small model", "same model"])
def test_assisted_decoding_gives_the_greedy_tokens(name, drafts):
    if zoo.FAMILIES[name].has_sliding and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("transformers up to 5.17 cannot take rejected drafts back from sliding-window layers")
    model, prompts = build(name), zoo.inputs(name, 48, images=False)
    prompts["input_ids"][:, -12:] = prompts["input_ids"][:, :12]
    if drafts == "lookup":
        extra = dict(prompt_lookup_num_tokens=5)
    else:
        extra = dict(assistant_model=zoo.build("llama", seed=3) if drafts == "small model" else build(name))
    skip_unless_stock_can(model, prompts, **extra)
    greedy, _ = oracle.generate(model, prompts, 12, past_key_values=mixkv.MixKVCache(model, **SMALL))
    options = dict(max_new_tokens=12, do_sample=False, **extra)
    for cache in (mixkv.MixKVCache(model, **SMALL), mixkv.MixKVCache(**SMALL)):
        if cache.layers == []:
            mixkv.unpatch(model)
            if Version(transformers.__version__) < Version("5.15"):
                # It is not informed of assisted decoding before the first forward, which brings drafts.
                with pytest.raises(RuntimeError, match=r"with a cache made by MixKVCache\(model"):
                    model.generate(**prompts, **options, past_key_values=cache)
                continue
        tokens = model.generate(**prompts, **options, past_key_values=cache)[:, 48:]
        assert torch.equal(tokens, greedy)
        rows = [length for layer in held(cache) if layer for row in layer for length in row]
        assert sum(rows) / len(rows) == SMALL["budget"] + 11
    mixkv.patch(model, **SMALL)
    assert torch.equal(model.generate(**prompts, **options)[:, 48:], greedy)


def test_a_patched_assistant_is_not_compressed():
    model, assistant = zoo.build("llama"), zoo.build("llama", seed=3)
    prompts = prompts_for("llama")
    greedy, _ = oracle.generate(model, prompts, 10, past_key_values=mixkv.MixKVCache(model, **SMALL))
    mixkv.patch(assistant, **SMALL)
    tokens = model.generate(
        **prompts,
        max_new_tokens=10,
        do_sample=False,
        assistant_model=assistant,
        past_key_values=mixkv.MixKVCache(model, **SMALL),
    )
    assert torch.equal(tokens[:, 48:], greedy)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_vl"])
def test_beams_equal_rows_followed_one_by_one(name):
    """Beam search's own score of its best beam equals the score of those tokens fed to a fresh compressed cache."""
    model, prompts = build(name), prompts_for(name, 2)
    out = oracle.beams(model, prompts, mixkv.MixKVCache(model, **SMALL))
    for row in range(2):
        single = {key: value[row : row + 1] for key, value in prompts.items()}
        if name == "qwen2_vl":
            single = zoo.ragged(name, [48, 48])[1][row]
        forced = force(out.sequences[row, 48:])
        _, logits = oracle.generate(
            model, single, 8, past_key_values=mixkv.MixKVCache(model, **SMALL), prefix_allowed_tokens_fn=forced
        )
        score = logits[0].log_softmax(-1).gather(1, out.sequences[row, 48:].unsqueeze(1)).sum()
        assert abs(score - out.sequences_scores[row]) < 1e-3


def force(tokens):
    return lambda _, ids: [int(tokens[min(ids.shape[0] - 48, len(tokens) - 1)])]


def test_sampling_and_return_sequences():
    model, prompts = zoo.build("llama"), prompts_for("llama", 2)
    mixkv.patch(model, **SMALL)
    torch.manual_seed(0)
    out = model.generate(
        **prompts, max_new_tokens=6, do_sample=True, num_return_sequences=3, return_dict_in_generate=True, output_logits=True
    )
    assert out.sequences.shape[0] == 6
    for row in range(6):
        single = {key: value[row // 3 : row // 3 + 1] for key, value in prompts.items()}
        _, logits = oracle.generate(model, single, 6, prefix_allowed_tokens_fn=force(out.sequences[row, 48:]))
        steps = out.sequences.shape[1] - 48
        assert (torch.stack(out.logits, 1)[row] - logits[0, :steps]).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_on_one_cache(name):
    """A second turn sees what the first left: equal to one masked forward over all of it."""
    model, prompts = build(name), prompts_for(name, 2)
    cache = mixkv.MixKVCache(model, **SMALL)
    first, _ = oracle.generate(model, prompts, 4, past_key_values=cache)
    masks = oracle.keep_masks(cache, 48, 2)
    more = torch.randint(zoo.TEXT.start, zoo.TEXT.stop, (2, 7), generator=torch.Generator().manual_seed(5))
    ids = torch.cat([prompts["input_ids"], first, more], dim=1)
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens, logits = oracle.generate(model, second, 4, past_key_values=cache)
    assert cache.get_seq_length() == 48 + 4 + 7 + 3

    mixkv.unpatch(model)
    stock = transformers.DynamicCache(config=model.config)
    with oracle.masked(model, masks, 48):
        oracle.generate(model, prompts, 4, past_key_values=stock)
        masked_tokens, masked_logits = oracle.generate(model, second, 4, past_key_values=stock)
    assert (logits - masked_logits).abs().max() < 1e-4
    assert torch.equal(tokens, masked_tokens)


def test_turns_with_padding_in_both():
    model = zoo.build("llama")
    batch, rows = zoo.ragged("llama", [48, 41])
    cache = mixkv.MixKVCache(model, **SMALL)
    first, _ = oracle.generate(model, batch, 4, past_key_values=cache)
    added = [torch.randint(4, 100, (1, n), generator=torch.Generator().manual_seed(n)) for n in (3, 6)]
    pads = [torch.zeros(1, 6 - part.shape[1], dtype=torch.long) for part in added]
    block = torch.cat([torch.cat([pad, part], 1) for pad, part in zip(pads, added)])
    block_mask = torch.cat([torch.cat([pad, torch.ones_like(part)], 1) for pad, part in zip(pads, added)])
    ids = torch.cat([batch["input_ids"], first, block], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(first), block_mask], 1)
    _, logits = oracle.generate(model, {"input_ids": ids, "attention_mask": mask}, 4, past_key_values=cache)
    for row in range(2):
        alone = mixkv.MixKVCache(model, **SMALL)
        start, _ = oracle.generate(model, rows[row], 4, past_key_values=alone)
        assert torch.equal(start[0], first[row])
        ids = torch.cat([rows[row]["input_ids"], start, added[row]], 1)
        single = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        _, expected = oracle.generate(model, single, 4, past_key_values=alone)
        assert (logits[row] - expected[0]).abs().max() < 1e-4


def test_one_compressed_prompt_answers_many_questions():
    model, prompts = zoo.build("llama"), prompts_for("llama")
    cache = mixkv.MixKVCache(model, **SMALL)
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
    size = cache.stats()["bytes"]
    for seed in range(3):
        question = torch.randint(4, 100, (1, 5), generator=torch.Generator().manual_seed(seed))
        ids = torch.cat([prompts["input_ids"], question], 1)
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        answers = [oracle.generate(model, asked, 4, past_key_values=part)[1] for part in copies]
        assert torch.equal(*answers)
        assert cache.get_seq_length() == 48 and cache.stats()["bytes"] == size


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("method", ["snapkv", "adakv"])
def test_decode_budget_bounds_long_decoding(name, method):
    model, prompts = build(name), prompts_for(name, 2)
    cache = mixkv.MixKVCache(model, method=method, decode_budget=20, decode_slack=8, **SMALL)
    tokens, _ = oracle.generate(model, prompts, 60, past_key_values=cache)
    assert tokens.shape[1] == 60 and cache.get_seq_length() == 107
    for layer, kept in zip(cache.layers, map(cache.kept, range(len(cache.layers)))):
        if kept is None:
            continue
        for row in kept:
            assert sum(map(len, row)) <= (20 + 8) * len(row)
            for positions in row:
                assert positions[-6:].tolist() == list(range(101, 107))
                assert (positions[1:] > positions[:-1]).all()
        assert layer.window.query.shape[2] == 6


def test_without_decode_budget_nothing_generated_is_dropped():
    model, prompts = zoo.build("llama"), prompts_for("llama")
    cache = mixkv.MixKVCache(model, **SMALL)
    oracle.generate(model, prompts, 60, past_key_values=cache)
    for row in cache.kept(0):
        for positions in row:
            assert positions[-60:].tolist() == list(range(47, 107))


def test_decode_recompression_ranks_by_the_last_queries():
    """The held rows are ranked again with the last window of queries, and bounded."""
    model, prompts = zoo.build("llama"), prompts_for("llama")
    options = dict(method="adakv", decode_budget=20, decode_slack=8, **SMALL)
    cache = mixkv.MixKVCache(model, **options)
    prompt_calls, later = [], []
    rank = mixkv.cache.compress.rank

    def recorded(query, key, value, config, **rest):
        (prompt_calls if key.shape[2] == columns else later).append(query.shape[2])
        return rank(query, key, value, config, **rest)

    columns = prompts["input_ids"].shape[1]
    mixkv.cache.compress.rank = recorded
    try:
        oracle.generate(model, prompts, 30, past_key_values=cache)
    finally:
        mixkv.cache.compress.rank = rank
    assert len(prompt_calls) == 3
    assert later and set(later) == {6}
    assert all(total <= (20 + 8 + 1) * layer.store.heads for layer in cache.layers for total in layer.store.row_totals)


LONGROPE = dict(
    original_max_position_embeddings=40,
    rope_parameters=dict(
        rope_type="longrope",
        rope_theta=10000.0,
        original_max_position_embeddings=40,
        short_factor=[1.0] * 8,
        long_factor=[1.5 + 0.25 * index for index in range(8)],
    ),
)


@pytest.mark.parametrize("patched", [True, False])
def test_long_prompts_are_compressed_where_the_rotary_embedding_changes(patched, recwarn):
    """phi3 throws short caches away then, and an unused one is not to be taken for one."""
    model = zoo.build("phi3", **LONGROPE)
    prompts = zoo.inputs("phi3", 44)
    expected = model.generate(**prompts, max_new_tokens=6, do_sample=False)
    for budget in (14, 400):
        options = dict(window=6, budget=budget)
        cache = mixkv.MixKVCache(model, **options)
        if patched:
            with mixkv.patched(model, **options):
                found = model.generate(**prompts, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
            tokens, cache = found.sequences, found.past_key_values
        else:
            tokens = model.generate(**prompts, past_key_values=cache, max_new_tokens=6, do_sample=False)
        stats = cache.stats()
        assert stats["seen"] == 49 and stats["rows"] == (min(budget, 44) + 5) * 2 * 2
    assert torch.equal(tokens, expected)
    assert not [warning for warning in recwarn if "compressed cache" in str(warning.message)]


def test_a_cache_that_phi3_throws_away_says_so():
    model = zoo.build("phi3", **LONGROPE)
    prompts = zoo.inputs("phi3", 36)
    cache = mixkv.MixKVCache(model, window=6, budget=14)
    assert not cache
    with pytest.warns(UserWarning, match="throws this compressed cache away: beyond 40 tokens") as told:
        model.generate(**prompts, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert len([warning for warning in told if "compressed cache" in str(warning.message)]) == 1
    assert cache and cache.stats()["seen"] == 40
    again = mixkv.MixKVCache(model, window=6, budget=14)
    tokens = model.generate(**prompts, past_key_values=again, max_new_tokens=3, do_sample=False)
    with pytest.warns(UserWarning, match="give the first prompt more than 40"):
        model.generate(torch.cat([tokens, tokens[:, :9]], 1), past_key_values=again, max_new_tokens=2, do_sample=False)


def test_decode_budget_with_padding_in_the_second_turn():
    model = zoo.build("llama")
    batch, rows = zoo.ragged("llama", [48, 41])
    options = dict(decode_budget=20, decode_slack=2, **SMALL)
    added = [torch.randint(4, 100, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 12)]
    block = torch.cat([torch.nn.functional.pad(part, (12 - part.shape[1], 0)) for part in added])
    mask = torch.cat([batch["attention_mask"], (block > 0).long()], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    together = mixkv.MixKVCache(model, **options)
    with torch.no_grad():
        model(**batch, past_key_values=together, position_ids=places[:, :48])
        model(input_ids=block, attention_mask=mask, past_key_values=together, position_ids=places[:, 48:])
        for row in range(2):
            alone = mixkv.MixKVCache(model, **options)
            model(**rows[row], past_key_values=alone)
            model(input_ids=added[row], past_key_values=alone)
            for layer in range(3):
                assert [len(part) for part in together.kept(layer)[row]] == [len(part) for part in alone.kept(layer)[0]]
                for kept, expected in zip(together.kept(layer)[row], alone.kept(layer)[0]):
                    assert places[row][kept.long()].tolist() == expected.tolist()


def test_assisted_decoding_with_decode_budget():
    model, prompts = zoo.build("llama"), prompts_for("llama")
    cache = mixkv.MixKVCache(model, decode_budget=20, decode_slack=4, **SMALL)
    tokens = model.generate(**prompts, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=4, past_key_values=cache)
    assert tokens.shape[1] == 88
    assert max(max(row) for layer in held(cache) for row in layer) < 48


def test_streaming():
    model, prompts = zoo.build("llama"), prompts_for("llama")
    mixkv.patch(model, **SMALL)

    class Collect:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            pass

    streamer = Collect()
    tokens = model.generate(**prompts, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.tokens == tokens[0].tolist()


def test_text_generation_pipeline(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{index}": index for index in range(zoo.VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w4"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w123")
    model = zoo.build("llama")
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = " ".join(f"w{4 + index * 7 % 100}" for index in range(40))
    options = dict(max_new_tokens=8, do_sample=False, return_full_text=False)
    full = pipe(text, **options)
    mixkv.patch(model, **SMALL)
    small = pipe(text, **options)
    prompt = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert small[0]["generated_text"].split() == tokenizer.decode(expected[0, 40:]).split()
    mixkv.unpatch(model)
    assert pipe(text, **options) == full


def test_two_caches_in_turn_and_in_threads_do_not_touch_each_other():
    model = zoo.build("llama")
    prompts = [prompts_for("llama", seed=seed) for seed in range(2)]
    expected = [oracle.generate(model, prompt, 12, past_key_values=mixkv.MixKVCache(model, **SMALL))[1] for prompt in prompts]

    caches = [mixkv.MixKVCache(model, **SMALL) for _ in prompts]
    with torch.no_grad():
        logits = [model(**prompt, past_key_values=cache).logits[:, -1] for prompt, cache in zip(prompts, caches)]
        for step in range(11):
            for index, cache in enumerate(caches):
                assert (logits[index] - expected[index][:, step]).abs().max() < 1e-4
                logits[index] = model(logits[index].argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1]

    results = [None, None]

    def work(index):
        results[index] = oracle.generate(model, prompts[index], 12, past_key_values=mixkv.MixKVCache(model, **SMALL))[1]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got, want) for got, want in zip(results, expected))


def test_user_compiled_model():
    model, prompts = zoo.build("llama"), prompts_for("llama")
    expected, logits = oracle.generate(model, prompts, 5, past_key_values=mixkv.MixKVCache(model, **SMALL))
    compiled = torch.compile(model, backend="eager")
    cache = mixkv.MixKVCache(model, **SMALL)
    with torch.no_grad():
        out = compiled(**prompts, past_key_values=cache).logits[:, -1]
        for step in range(4):
            assert (out - logits[:, step]).abs().max() < 1e-4
            out = compiled(out.argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1]
    assert held(cache)[0][0] != [51, 51]
    mixkv.unpatch(model)
    mixkv.patch(compiled, **SMALL)
    tokens = compiled.generate(**prompts, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens[:, 48:], expected)


def test_row_operations_match_a_dynamic_cache():
    """select, repeat and reorder rows as transformers' own cache does."""
    model, prompts = zoo.build("gemma3", "sdpa"), prompts_for("gemma3", 3)
    step = torch.tensor([[7], [8], [9], [10], [11], [12]])
    caches = [mixkv.MixKVCache(model, budget=1000), transformers.DynamicCache(config=model.config)]
    logits = []
    for cache in caches:
        with torch.no_grad():
            model(**prompts, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            model(step, past_key_values=cache)
            cache.reorder_cache(torch.tensor([5, 0, 0, 3, 2, 1]))
            model(step, past_key_values=cache)
            cache.batch_select_indices(torch.tensor([4, 1]))
            logits.append(model(step[:2], past_key_values=cache).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_crop_takes_back_the_tail_only():
    model, prompts = zoo.build("llama"), prompts_for("llama")
    cache = mixkv.MixKVCache(model, **SMALL)
    more = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        model(**prompts, past_key_values=cache)
        before = model(more[:, :1], past_key_values=copy.deepcopy(cache)).logits
        model(more, past_key_values=cache)
        cache.crop(-4)
        assert torch.allclose(model(more[:, :1], past_key_values=cache).logits, before, atol=1e-5)
    with pytest.raises(ValueError, match="cannot crop 20 tokens: only the 1"):
        cache.crop(-20)
