"""A cache from a file goes on as the one in memory does, bit for bit; a file that is not one says so."""

import copy
import pickle
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from packaging import version
from support import linear_models, oracle, zoo
from transformers import cache_utils

from mixkv import MixKVCache, checked_file
from mixkv.cache import parts, save
from mixkv.hf import stock_layers

SMALL = dict(budget=14, window=6, kernel_size=3)


def filled(model, prompts, steps=4, **options):
    """A cache that has read ``prompts`` and answered, and its answer."""
    cache = MixKVCache(model, **(SMALL | options))
    return cache, oracle.generate(model, prompts, steps, past_key_values=cache)[0]


def second_turn(prompts, answer, seed=0, count=7):
    """The conversation so far and a question of ``count`` random tokens."""
    more = torch.randint(zoo.TEXT.start, zoo.TEXT.stop, (answer.shape[0], count), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([prompts["input_ids"], answer, more], dim=1)
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(ids[:, prompts["attention_mask"].shape[1] :])], dim=1)
    turn = {"input_ids": ids, "attention_mask": mask}
    cross = prompts.get("cross_attention_mask")
    if cross is not None:
        new = ids.shape[1] - cross.shape[1]
        turn["cross_attention_mask"] = torch.cat([cross, cross[:, -1:].expand(-1, new, *cross.shape[2:])], dim=1)
    return turn


def equal_caches(first, second):
    layers = range(len(first.layers))
    kept = [[part.tolist() for row in cache.kept(layer) or [] for part in row] for cache in (first, second) for layer in layers]
    same = kept[: len(kept) // 2] == kept[len(kept) // 2 :]
    bounds = [
        [(part.store.max_length, part.store.even, part.store.tail) for part in cache.layers if hasattr(part, "store")]
        for cache in (first, second)
    ]
    same &= bounds[0] == bounds[1] and first._state.rollback_enabled == second._state.rollback_enabled
    numbers, others = first.stats(), second.stats()
    redundancy = all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(numbers["redundancy"], others["redundancy"])
    )
    return same and redundancy and all(numbers[name] == others[name] for name in ("rows", "seen", "bytes_full"))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "qwen2_vl", "mllama"])
def test_a_loaded_cache_goes_on_as_the_one_in_memory(tmp_path, name, backend):
    """Batches with padding, made afresh each time; the model is built anew, as it would be tomorrow."""
    attn, seed = zoo.FAMILIES[name].attn[-1], random.randrange(1000)
    lengths = [random.Random(seed + row).randint(30, 50) for row in range(2)]
    model, prompts = zoo.build(name, attn), zoo.ragged(name, lengths, seed=seed)[0]
    cache, answer = filled(model, prompts, backend=backend, method=random.choice(["adakv", "snapkv"]))
    cache.save(tmp_path / "prompt.mixkv")
    fresh = zoo.build(name, attn)
    loaded = MixKVCache.load(tmp_path / "prompt.mixkv", fresh)
    assert loaded.config == cache.config and equal_caches(cache, loaded), f"seed {seed}"
    turn = second_turn(prompts, answer, seed)
    tokens, logits = oracle.generate(model, turn, 6, past_key_values=cache)
    loaded_tokens, loaded_logits = oracle.generate(fresh, turn, 6, past_key_values=loaded)
    assert torch.equal(tokens, loaded_tokens) and torch.equal(logits, loaded_logits), f"seed {seed}"
    assert equal_caches(cache, loaded)
    _, other = oracle.generate(fresh, turn, 6, past_key_values=MixKVCache(fresh, **SMALL))
    assert not torch.equal(other, logits), "another cache gives other logits, so that the comparison can fail"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    model, prompts = zoo.build("llama").to(dtype), zoo.inputs("llama", 48)
    cache, answer = filled(model, prompts)
    cache.save(tmp_path / "half")
    loaded = MixKVCache.load(str(tmp_path / "half"), model)
    assert loaded.layers[0].store.key.dtype == dtype
    turn = second_turn(prompts, answer)
    results = [oracle.generate(model, turn, 6, past_key_values=part)[1] for part in (cache, loaded)]
    assert torch.equal(*results)
    with pytest.raises(ValueError, match=rf"holds {str(dtype)[6:]}.*computes in float32: load the model with dtype={dtype}"):
        MixKVCache.load(tmp_path / "half", zoo.build("llama"))


def test_loaded_twice_is_two_caches(tmp_path):
    model, prompts = zoo.build("gemma3"), zoo.inputs("gemma3", 48)
    path = tmp_path / "prompt"
    cache, answer = filled(model, prompts)
    cache.save(path)
    written = path.read_bytes()
    loaded = [MixKVCache.load(path, model) for _ in range(3)]
    first = oracle.generate(model, second_turn(prompts, answer, 1), 5, past_key_values=loaded[0])[1]
    turn = second_turn(prompts, answer, 2)
    expected = oracle.generate(model, turn, 5, past_key_values=cache)[1]
    assert not torch.equal(first, expected)
    for part in loaded[1:]:
        assert torch.equal(oracle.generate(model, turn, 5, past_key_values=part)[1], expected)
    assert path.read_bytes() == written


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_decode_budget_crop_and_rows_go_on(tmp_path, name):
    model, prompts = zoo.build(name, "eager"), zoo.ragged(name, [48, 41, 44])[0]
    cache, _ = filled(model, prompts, method="adakv", decode_budget=16, decode_slack=1)
    cache.save(tmp_path / "prompt")
    loaded = MixKVCache.load(tmp_path / "prompt", model)
    step = torch.tensor([[5], [6], [7]])
    logits = []
    for part in (cache, loaded):
        with torch.no_grad():
            if name == "llama":  # transformers' sliding layers cannot be cropped unasked
                part.crop(-2)
            part.batch_select_indices(torch.tensor([2, 0, 0]))
            for _ in range(20):
                logits.append(model(step, past_key_values=part).logits)
    assert torch.equal(torch.stack(logits[:20]), torch.stack(logits[20:]))
    assert max(part.store.max_length for part in cache.layers if hasattr(part, "store")) < 30
    assert equal_caches(cache, loaded)
    with pytest.raises(ValueError, match="cannot crop 25 tokens"):
        loaded.layers[1].crop(-25)


def test_bounds_that_attention_runs_by_are_kept(tmp_path):
    model, prompts = zoo.build("llama"), zoo.ragged("llama", [48, 9])[0]
    cache, _ = filled(model, prompts, method="snapkv")
    cache.batch_select_indices(torch.tensor([1]))
    cache.save(tmp_path / "short")
    loaded = MixKVCache.load(tmp_path / "short", model)
    store = cache.layers[0].store
    assert store.max_length > max(store.lengths.tolist()) and not store.even
    assert equal_caches(cache, loaded)


def test_a_cache_of_assisted_decoding(tmp_path):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 48)
    cache = MixKVCache(model, decode_budget=16, decode_slack=1, **SMALL)
    options = dict(do_sample=False, prompt_lookup_num_tokens=3)
    answer = model.generate(**prompts, max_new_tokens=6, past_key_values=cache, **options)[:, 48:]
    cache.save(tmp_path / "prompt")
    loaded = MixKVCache.load(tmp_path / "prompt", model)
    assert equal_caches(cache, loaded)
    turn = second_turn(prompts, answer)
    if version.parse(transformers.__version__) < version.parse("5.23"):
        # Older versions read a filled cache's tokens again when they begin with drafts.
        del options["prompt_lookup_num_tokens"]
    tokens = [model.generate(**turn, max_new_tokens=12, past_key_values=part, **options) for part in (cache, loaded)]
    assert torch.equal(*tokens) and equal_caches(cache, loaded)
    with torch.no_grad():
        logits = [model(torch.tensor([[5, 6, 7]]), past_key_values=part).logits for part in (cache, loaded)]
    assert torch.equal(*logits) and equal_caches(cache, loaded)


def test_only_the_rows_held_are_written_and_saving_again_gives_the_same_file(tmp_path):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 48)
    cache, _ = filled(model, prompts)
    before = cache.stats()
    cache.save(tmp_path / "one")
    assert str(cache.stats()) == str(before)
    tensors = safetensors.torch.load_file(tmp_path / "one")
    assert sum(part.shape[0] for name, part in tensors.items() if name.endswith(".key")) == before["rows"]
    MixKVCache.load(tmp_path / "one", model).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_image_positions_survive_another_image_on_the_model(tmp_path):
    """qwen2_vl keeps on itself how far an image moved the positions after it; the file brings that along."""
    model = zoo.build("qwen2_vl")
    prompts, other = zoo.inputs("qwen2_vl", 48, batch=2), zoo.inputs("qwen2_vl", 48)
    cache, answer = filled(model, prompts)
    cache.save(tmp_path / "image")
    turn = second_turn(prompts, answer)
    expected = oracle.generate(model, turn, 5, past_key_values=copy.deepcopy(cache))[1]
    deltas = model.model.rope_deltas.clone()
    filled(model, other)
    assert not torch.equal(model.model.rope_deltas, deltas)
    loaded = MixKVCache.load(tmp_path / "image", model)
    assert torch.equal(oracle.generate(model, turn, 5, past_key_values=loaded)[1], expected)
    copy.deepcopy(cache).save(tmp_path / "copy")
    with pytest.raises(ValueError, match="how far images move the positions"):
        MixKVCache.load(tmp_path / "copy", model)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3_vision", "llama"])
def test_what_is_known_of_images_is_kept(tmp_path, name):
    """`stats` tells the same of images before and after, and again after another turn."""
    model, twin = zoo.build(name), zoo.build(name)
    prompts = zoo.ragged(name, [48, 40])[0]
    cache, answer = filled(model, prompts)
    cache.save(tmp_path / "image")
    loaded = MixKVCache.load(tmp_path / "image", twin)
    assert (cache.stats()["image_rows"][1] is not None) == zoo.FAMILIES[name].vision
    assert same_modality(cache, loaded)
    turn = second_turn(prompts, answer)
    oracle.generate(model, turn, 3, past_key_values=cache)
    oracle.generate(twin, turn, 3, past_key_values=loaded)
    assert same_modality(cache, loaded)


def same_modality(first, second):
    return all(
        mine is other is None or torch.allclose(mine, other, rtol=0, atol=0, equal_nan=True)
        for name in ("image_rows", "text_rows", "redundancy_image", "redundancy_text")
        for mine, other in zip(first.stats()[name], second.stats()[name], strict=True)
    )


def test_a_damaged_image_mask(tmp_path):
    model = zoo.build("gemma3_vision")
    filled(model, zoo.inputs("gemma3_vision", 40))[0].save(tmp_path / "whole")
    header, tensors = checked_file.read(tmp_path / "whole", range(save.FORMAT, save.FORMAT + 1))
    checked_file.write(tmp_path / "forged", header, tensors | {"image_mask": tensors["image_mask"][0]})
    with pytest.raises(ValueError, match="image mask"):
        MixKVCache.load(tmp_path / "forged", model)


def test_a_model_with_linear_attention_layers(tmp_path):
    model = linear_models.lfm2("conv", "full_attention", "conv")
    prompts = zoo.inputs("llama", 40)
    cache, answer = filled(model, prompts)
    cache.save(tmp_path / "prompt")
    loaded = MixKVCache.load(tmp_path / "prompt", model)
    turn = second_turn(prompts, answer)
    results = [oracle.generate(model, turn, 5, past_key_values=part)[1] for part in (cache, loaded)]
    assert torch.equal(*results)


@pytest.mark.skipif(not hasattr(cache_utils, "LinearAttentionLayer"), reason="needs transformers' linear-attention layer")
def test_linear_attention_states_are_copied():
    layer = cache_utils.LinearAttentionLayer()
    layer.update_conv_state(torch.randn(2, 5, 4))
    layer.update_recurrent_state(torch.randn(2, 3, 4))
    tensors, numbers = stock_layers.state(layer)
    twin = cache_utils.LinearAttentionLayer()
    stock_layers.restore(twin, tensors, numbers, torch.device("cpu"))
    more = torch.randn(2, 5, 1)
    assert torch.equal(layer.update_conv_state(more), twin.update_conv_state(more))
    assert torch.equal(layer.recurrent_states[0], twin.recurrent_states[0])
    assert layer.recurrent_states[0].data_ptr() != twin.recurrent_states[0].data_ptr()
    assert layer.has_previous_state == twin.has_previous_state and layer.conv_kernel_size == twin.conv_kernel_size


def test_what_cannot_be_saved(tmp_path):
    model, prompts = zoo.build("gemma3"), zoo.inputs("gemma3", 40)
    path = tmp_path / "no"
    for empty in (MixKVCache(model, **SMALL), MixKVCache(**SMALL)):
        with pytest.raises(ValueError, match="this cache is empty"):
            empty.save(path)
    cache, _ = filled(model, prompts)
    with pytest.raises(FileNotFoundError, match="create it first"):
        cache.save(tmp_path / "nowhere" / "no")
    cache.layers[0].__class__ = type("OwnLayer", (type(cache.layers[0]),), {})
    with pytest.raises(ValueError, match="layer 0 of Gemma3ForCausalLM: a OwnLayer cannot be saved; known are DynamicLayer"):
        cache.save(path)
    half = MixKVCache(model, **SMALL)
    layer = half.layers[1]
    layer.lazy_initialization(torch.zeros(1, 2, 8, 64), torch.zeros(1, 2, 8, 64))
    layer.prompt, layer.seen = parts.PromptSoFar(torch.zeros(1, 2, 8, 64), torch.zeros(1, 2, 8, 64)), 8
    with pytest.raises(ValueError, match="has read 8 tokens of a prompt, not all of it"):
        half.save(path)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_former_file(tmp_path, monkeypatch):
    model = zoo.build("llama")
    cache, _ = filled(model, zoo.inputs("llama", 40))
    path = tmp_path / "prompt"
    cache.save(path)
    written = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checked_file, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        cache.save(path)
    assert path.read_bytes() == written and list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and the file of a cache of its."""
    path = tmp_path_factory.mktemp("saved") / "prompt"
    model = zoo.build("llama")
    filled(model, zoo.inputs("llama", 40))[0].save(path)
    return model, path


def test_truncated_and_flipped_files(saved, tmp_path):
    model, path = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    seed = random.randrange(1000)
    rng = random.Random(seed)
    damaged = [whole[:length] for length in (0, 1, 7, 8, 9, header - 1, header, len(whole) - 1)]
    damaged += [whole[: rng.randrange(len(whole))] for _ in range(15)]
    for place in [
        *range(8),
        *(rng.randrange(8, header) for _ in range(60)),
        *(rng.randrange(header, len(whole)) for _ in range(25)),
    ]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for index, content in enumerate(damaged):
        other = tmp_path / f"damaged{index}"
        other.write_bytes(content)
        with pytest.raises(ValueError, match=f"damaged{index} .*(save the cache again|give the path|save it again)"):
            save.read(other)
    with pytest.raises(ValueError, match="is damaged"):
        MixKVCache.load(tmp_path / "damaged0", model)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_nothing_is_unpickled(saved, tmp_path, monkeypatch):
    model, path = saved
    monkeypatch.chdir(tmp_path)
    Path("plain").write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), "zipped")
    for name in ("plain", "zipped"):
        with pytest.raises(ValueError, match=f"{name} is damaged, or no cache that MixKVCache.save wrote"):
            MixKVCache.load(name, model)
    assert not Path("exploded").exists()

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert MixKVCache.load(path, model).get_seq_length() == 43


def test_foreign_files(saved, tmp_path):
    model, _ = saved
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights is a safetensors file, but no cache that MixKVCache.save wrote"):
        MixKVCache.load(tmp_path / "weights", model)
    with pytest.raises(FileNotFoundError):
        MixKVCache.load(tmp_path / "missing", model)


def test_other_models(saved):
    _, path = saved

    def llama(**changes):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(zoo.FAMILIES["llama"].config | changes)))

    for other, message in [
        (zoo.build("qwen2"), "from a LlamaForCausalLM, and this model is a Qwen2ForCausalLM: load the model it was saved from"),
        (llama(num_hidden_layers=5), "holds 3 layers, and this model has 5"),
        (llama(num_key_value_heads=4), "layer 0 in .* has heads=2, and this model's has 4"),
        (llama(head_dim=32), "layer 0 in .* has key_size=16, and this model's has 32"),
        (zoo.build("llama", seed=1), r"other weights \(layers \[0, 1, 2\] differ\)"),
        (zoo.build("llama").to(torch.bfloat16), "holds float32, and this model computes in bfloat16"),
        (torch.nn.Linear(2, 2), "PreTrainedModel, not Linear"),
    ]:
        with pytest.raises(ValueError, match=message):
            MixKVCache.load(path, other)


def test_other_layer_kinds(tmp_path):
    model = zoo.build("gemma3")
    filled(model, zoo.inputs("gemma3", 40))[0].save(tmp_path / "prompt")
    for changes, message in [
        (dict(layer_types=["full_attention"] * 3), "layer 0 in .* has kind='DynamicSlidingWindowLayer'"),
        (dict(sliding_window=zoo.WINDOW + 1), "layer 0 in .* has sliding_window=16, and this model's has 17"),
    ]:
        config = transformers.Gemma3TextConfig(**(zoo.FAMILIES["gemma3"].config | changes))
        with pytest.raises(ValueError, match=message):
            MixKVCache.load(tmp_path / "prompt", transformers.Gemma3ForCausalLM(config))


def forged(saved, tmp_path, change):
    """The file with its header and tensors changed, and a checksum that fits them."""
    header, tensors = checked_file.read(saved[1], range(save.FORMAT, save.FORMAT + 1))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(header, tensors)
    checked_file.write(tmp_path / "forged", header, tensors)
    return tmp_path / "forged"


def shift(header, tensors):
    tensors["0.lengths"] += torch.tensor([[1000, -1000]], dtype=torch.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda header, _: header.update(format=save.FORMAT + 1, mixkv="9.0"),
            rf"format {save.FORMAT + 1} \(saved by mixkv 9.0\), and this mixkv reads format {save.FORMAT}",
        ),
        (lambda header, _: header.pop("config"), r"its header lacks \['config'\]"),
        (lambda header, _: header["config"].update(colour="red"), "unknown option colour='red'.*load it with that version"),
        (
            lambda header, _: header["layers"][0].update(kind="DynamicLayer"),
            "kind='DynamicLayer', and this model's has 'MixKVLayer'",
        ),
        (lambda header, _: header.update(batch=2), "damaged.*layer 0"),
        (lambda header, _: header["layers"][1].update(tail=99), "damaged.*layer 1"),
        (lambda header, _: header["layers"][1].update(bound=10**12), "damaged.*layer 1"),
        (lambda header, _: header["layers"][2].pop("scaling"), r"damaged \(layer 2 lacks \['scaling'\]"),
        (shift, "damaged.*layer 0"),
        (lambda _, tensors: tensors.pop("2.position"), "damaged.*layer 2"),
        (lambda _, tensors: tensors.update({"2.key": tensors["2.key"][:-1]}), "damaged.*layer 2"),
    ],
)
def test_headers_that_do_not_fit(saved, tmp_path, change, message):
    path = forged(saved, tmp_path, change)
    with pytest.raises(ValueError, match=message) as info:
        MixKVCache.load(path, saved[0])
    assert "forged" in str(info.value)


def test_a_file_for_another_machines_back_end(saved, tmp_path):
    path = forged(saved, tmp_path, lambda header, _: header["config"].update(backend="varlen"))
    with pytest.raises(ValueError, match="backend='varlen' cannot be used"):
        MixKVCache.load(path, saved[0])
    assert MixKVCache.load(path, saved[0], backend="torch").layers[0].store.backend == "torch"
