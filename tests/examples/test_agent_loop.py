"""The agent's loop on tiny models: a conversation read turn by turn says what one read at once says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from support import zoo, zoo_processors
from transformers import DynamicCache

import mixkv

EXAMPLE = Path(__file__).parents[2] / "examples" / "agent_loop.py"


@pytest.fixture
def example():
    pytest.importorskip("PIL")
    spec = importlib.util.spec_from_file_location("agent_loop_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def talk(example, model, processor, cache):
    conversation = example.Conversation(model, processor, cache)
    for turn in range(3):
        image = None if turn == 2 else zoo_processors.picture(64, 96 + 32 * turn)
        conversation.ask(zoo_processors.words(12, seed=turn), image, tokens=3)
    return conversation


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_turns_say_what_the_whole_says(example, name):
    model, processor = zoo.build(name), zoo_processors.build(name)
    conversation = talk(example, model, processor, DynamicCache(config=model.config))
    images = [zoo_processors.picture(64, 96), zoo_processors.picture(64, 128)]
    whole = {name: part[:, :-3] for name, part in conversation.aligned.items()}
    whole |= processor.image_processor(images=images, return_tensors="pt")
    tokens = model.generate(**whole, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(conversation.aligned["input_ids"], tokens)
    bounded = talk(example, model, processor, mixkv.MixKVCache(model, turns="each", window=4, budget=12))
    assert bounded.cache.get_seq_length() == bounded.aligned["input_ids"].shape[1] - 1
    assert torch.stack(bounded.cache.stats()["lengths"]).float().mean() < 60
