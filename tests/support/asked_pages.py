"""Tiny vision-language models, random images and questions whose answers stand in boxes."""

import random

import torch

from mixkv.evaluation import boxes, loading
from mixkv.evaluation.boxes import Asked, Box
from support import zoo, zoo_processors

# llava crops to the middle, qwen keeps the shape, llava_next and idefics3 cut into tiles.
SIZES = [(24, 40), (48, 24)]


def load(name, attn="sdpa"):
    processor = zoo_processors.build(name)
    return loading.Loaded(zoo.build(name, attn), processor.tokenizer, name, processor)


def next_word(loaded, images, question, words):
    """The model's own next word."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = loaded.processor(text=[text + " ".join(words)], images=[images], return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(**inputs).logits[0, -1]
    allowed = slice(zoo_processors.WORDS.start, zoo_processors.WORDS.stop)
    return f"w{zoo_processors.WORDS.start + int(logits[allowed].argmax())}"


def ask(loaded, sizes, seed, count=8):
    """Random images, and an answer of which every other word is the model's own; two of three words stand in a box."""
    chance = random.Random(seed)
    images = [zoo_processors.picture(*size, seed=seed + number) for number, size in enumerate(sizes)]
    question = zoo_processors.words(6, seed)
    words, found = [], []
    for index in range(count):
        word = zoo_processors.words(1, 77 * seed + index)
        word = next_word(loaded, images, question, words) if index % 2 == 0 else word
        start = len(" ".join([*words, ""]))
        words.append(word)
        if index % 3 < 2:
            image = chance.randrange(len(images))
            height, width = sizes[image]
            top, left = chance.randrange(height // 2), chance.randrange(width // 2)
            box = (top, left, chance.randrange(top, height) + 1, chance.randrange(left, width) + 1)
            found.append(Box(start, start + len(word), image, *box))
    return Asked(images, question, " ".join(words), found)


def use_small_pages(monkeypatch):
    """A tiny model and small pages in place of the real ones; returns the model."""
    loaded = load("qwen2_vl")
    monkeypatch.setattr(loading, "load", lambda *args, **options: loaded)
    monkeypatch.setattr(boxes, "make", lambda kind, seed, terse: ask(loaded, SIZES[: 1 + seed % 2], seed + 100 * len(kind)))
    return loaded
