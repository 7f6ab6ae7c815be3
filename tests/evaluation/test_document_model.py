"""The trained document model: its weights, its answers, and samples of pages."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from mixkv import MixKVCache, plot
from mixkv.evaluation import InputError, evaluate, pages

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("needs_smollm2")


@pytest.fixture(scope="module")
def loaded(needs_smollm2):
    from mixkv.evaluation import document_model as model

    return model.load()


def test_it_answers_from_pixels(loaded):
    """Also through generate and the processor, as a user calls it."""
    right = 0
    for seed in range(6):
        sample = pages.sample("form", loaded, seed)
        ids = torch.tensor([sample.context + sample.follow[0]])
        out = loaded.model.generate(input_ids=ids, **sample.inputs, max_new_tokens=40, do_sample=False)
        right += loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == sample.expected[0]
    assert right >= 4


def test_samples_are_told_apart_by_when_the_question_comes(loaded):
    asked, later = (pages.sample("two pages", loaded, 3, later=later) for later in (False, True))
    assert len(asked.follow) == 1 and len(asked.follow[0]) == 1 and len(later.follow) == 2
    patch = loaded.model.config.image_token_index
    assert asked.context.count(patch) == later.context.count(patch) == 2 * 576 and later.context[-1] == patch
    assert loaded.tokenizer.decode(later.answer[0]) == f" {later.expected[0]}<|im_end|>"
    assert {pages.sample("form", loaded, seed, keys=[1]).expected[0].count(",") for seed in range(3)} == {0}
    assert {pages.sample("form", loaded, seed, keys=[3]).expected[0].count(",") for seed in range(3)} == {2}
    with pytest.raises(ValueError, match="variant must be one of .*, not 'colour'"):
        pages.sample("form", loaded, 0, variant="colour")


def test_exact_answers_are_counted(loaded):
    from mixkv import MixKVConfig

    sample = pages.sample("form", loaded, 1)
    configs = [MixKVConfig(method="snapkv", score="attn", budget=budget) for budget in (500, 33)]
    (record,) = evaluate.run(loaded.model, loaded.tokenizer, [(("form", 0, 1), lambda: sample)], configs)
    ids = torch.tensor([sample.context + sample.follow[0]])
    for config, result in zip([None, *configs], [{"kept": record["answered"]}, *record["results"]]):
        # Decoding by hand: the last token of the prompt is read from the compressed cache too.
        cache = None if config is None else MixKVCache(loaded.model, config)
        with torch.no_grad():
            read = loaded.model(input_ids=ids[:, :-1], **sample.inputs, past_key_values=cache, use_cache=True).past_key_values
            tokens = [int(ids[0, -1])]
            for _ in sample.answer[0]:
                fed = torch.tensor([tokens[-1:]])
                tokens.append(int(loaded.model(input_ids=fed, past_key_values=read).logits[0, -1].argmax()))
        assert result["kept"] == (tokens[1:] == sample.answer[0])


def test_its_patches_are_drawn(loaded):
    pytest.importorskip("matplotlib").use("Agg")
    reading = pages.demo(loaded)
    cache = MixKVCache(loaded.model, budget=64)
    with torch.no_grad():
        loaded.model(input_ids=reading.input_ids, **reading.inputs, past_key_values=cache)
    assert sum(int(rows.sum()) for rows in cache.stats()["image_rows"]) > 0
    axes = plot.kept_patches(cache, reading.images, {"input_ids": reading.input_ids}, loaded.model.config)
    assert len(axes.collections[0].get_facecolor()) == 576


def test_weights_that_cannot_be_used_are_told(tmp_path):
    from mixkv.evaluation import document_model as model

    with pytest.raises(InputError, match=r"reader.safetensors are missing: install mixkv again, or train it"):
        model.load(weights=tmp_path)
    for name in (model.READER, model.LANGUAGE):
        shutil.copy(model.WEIGHTS / name, tmp_path / name)
    path = tmp_path / model.LANGUAGE
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="language.safetensors are damaged"):
        model.load(weights=tmp_path)
    path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with pytest.raises(InputError, match="language.safetensors are damaged .their checksum"):
        model.load(weights=tmp_path)
    path.write_bytes(whole)
    tensors = load_file(tmp_path / model.READER)
    model.write(tmp_path / model.READER, {name: value for name, value in tensors.items() if "patch_embedding" not in name})
    with pytest.raises(InputError, match="reader.safetensors is not of this model: .*patch_embedding"):
        model.load(weights=tmp_path)
