"""Pages with the boxes in which an answer stands, and which tokens and which image columns of a prompt those are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..document import page, questions
from ..hf.image_tokens import picture_token_ids
from ..plot.grid import Patch, locate
from . import InputError
from .loaded import Loaded
from .pages import KEYS
from .prompts import adds_special_tokens

# Kinds of pages whose answers stand on them, word by word. (On a screen they are places.)
KINDS = {kind.replace(" ", "-"): kind for kind in page.NAMES if kind != "screen"}
# The document model was trained to answer so; others are told.
TERSE = " Answer with nothing but the values as they stand on the page, separated by commas."
# Of an image's height and width: what two neighbours share of each other by rounding alone.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Box:
    """Where some characters of an answer stand.

    Attributes:
        start, end: characters ``answer[start:end]``.
        image: which of the images.
        top, left, bottom, right: pixels of that image.
    """

    start: int
    end: int
    image: int
    top: float
    left: float
    bottom: float
    right: float


@dataclass(frozen=True)
class Asked:
    """Images (PIL), a question about them, and its answer, of which every character that stands on them is in a box."""

    images: list
    question: str
    answer: str
    boxes: list[Box]


@dataclass(frozen=True)
class Target:
    """An answer token at ``column`` of the prompt, and the image columns that show what it spells."""

    column: int
    token: int
    shown: tuple[int, ...]


@dataclass(frozen=True)
class Aligned:
    """What a model takes to read a question and its answer [1, N], and the answer's tokens that stand on the images."""

    inputs: dict[str, torch.Tensor]
    targets: list[Target]


def make(kind: str, seed: int, *, terse: bool = True) -> Asked:
    """A page of a kind in `KINDS` made from a seed, and a question about two to four things on it.

    Seeds give other pages here than in `mixkv eval`. ``terse``: the question asks for nothing but the values.
    """
    from ..document import render

    document = page.make(KINDS[kind], f"boxed {seed}")
    images = [render.draw(one, f"boxed {seed} {number}") for number, one in enumerate(document.pages)]
    chance = random.Random(f"boxed {kind} {seed}")
    facts = questions.draw_facts(document, chance, chance.choice(KEYS))
    question = questions.ask(document, facts, chance.randrange(4)) + (TERSE if terse else "")
    answer = questions.answer(facts)
    boxes, at = [], 0
    for number, row, column in (cell for fact in facts for cell in fact.cells):
        text = document.pages[number].cells[row][column]
        at = answer.index(text, at)
        top, left = row * page.CELL, column * page.CELL
        boxes.append(Box(at, at + len(text), number, top, left, top + page.CELL, left + page.CELL))
        at += len(text)
    return Asked(images, question, answer, boxes)


def align(loaded: Loaded, asked: Asked) -> Aligned:
    """Question and answer as ``loaded`` reads them, and which of the answer's tokens stand where.

    A token that spells characters of several boxes stands in all of them; one whose boxes the processor cut off is no target.

    Raises:
        InputError: the model or its processor cannot read it so; the message says why.
    """
    text = _text(loaded.processor, asked)
    start = len(text) - len(asked.answer)
    inputs, tokens, offsets = _encode(loaded, asked.images, text, start)
    shown = _shown(loaded.model.config, asked, inputs)
    first = inputs["input_ids"].shape[1] - len(tokens)
    targets = []
    for index, (token, (low, high)) in enumerate(zip(tokens, offsets)):
        spelled = [columns for box, columns in zip(asked.boxes, shown) if box.start < high - start and low - start < box.end]
        if columns := set().union(*spelled):
            targets.append(Target(first + index, token, tuple(sorted(columns))))
    return Aligned(inputs, targets)


def covering(patches: Sequence[Patch | None], size: tuple[int, int], box: Box) -> list[int]:
    """The patches, by place, that show any part of a box, in whichever view of the image of ``size`` (height, width)."""
    height, width = size
    edges = (box.top / height, box.left / width, box.bottom / height, box.right / width)
    found = []
    for index, patch in enumerate(patches):
        if patch is None:
            continue
        down = min(patch.bottom, edges[2]) - max(patch.top, edges[0])
        across = min(patch.right, edges[3]) - max(patch.left, edges[1])
        if min(down, across) > _ROUNDING:
            found.append(index)
    return found


def with_offsets(tokenizer, text: str, **options):
    """``text`` as the tokenizer encodes it, with the characters that each token spells (``offset_mapping``).

    Raises:
        InputError: the tokenizer does not tell them.
    """
    try:
        return tokenizer(text, return_offsets_mapping=True, **options)
    except NotImplementedError as error:
        raise InputError(f"{type(tokenizer).__name__} does not tell which characters its tokens spell") from error


def _text(processor, asked: Asked) -> str:
    """The prompt, and the answer at its end."""
    content = [*({"type": "image"} for _ in asked.images), {"type": "text", "text": asked.question}]
    turns = [{"role": "user", "content": content}]
    said = {"role": "assistant", "content": [{"type": "text", "text": asked.answer}]}
    try:
        before = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        both = processor.apply_chat_template([*turns, said], tokenize=False)
    except ValueError as error:
        raise InputError(
            f"{type(processor).__name__} cannot put a question about an image ({error}): take a chat model"
        ) from error
    # What a template sets between its prompt for an answer and the answer: a space, or nothing.
    between, found, _ = both.removeprefix(before).partition(asked.answer)
    between = between if both.startswith(before) and found and not between.strip() else ""
    return before + between + asked.answer


def _encode(loaded: Loaded, images: list, text: str, start: int) -> tuple[dict, list[int], list[tuple[int, int]]]:
    """What the processor makes of it; and the last tokens, from character ``start`` on, with the characters that each spells."""
    processor, tokenizer = loaded.processor, loaded.tokenizer
    special = adds_special_tokens(tokenizer, text)
    _check_sizes(loaded.model.config, images)
    try:
        inputs = dict(processor(text=[text], images=[images], add_special_tokens=special, return_tensors="pt"))
    except ValueError as error:
        sizes = ", ".join(f"{one.height} x {one.width}" for one in images)
        raise InputError(f"{type(processor).__name__} cannot read images of {sizes} pixels: {error}") from error
    alone = with_offsets(tokenizer, text, add_special_tokens=special)
    pictures = picture_token_ids(loaded.model.config)
    ids = inputs["input_ids"][0].tolist()
    if not pictures & set(ids):
        raise InputError(
            f"the prompt of {loaded.name} has no image tokens: its chat template leaves images out, or they enter by cross-attention, "
            f"where a cache compresses nothing"
        )
    offsets = [tuple(pair) for pair in alone["offset_mapping"]]
    first = next(index for index, (_, high) in enumerate(offsets) if high > start)
    tokens = alone["input_ids"][first:]
    if tokens != ids[len(ids) - len(tokens) :]:
        raise InputError(
            f"{type(processor).__name__} reads the answer otherwise than its tokenizer does: it cannot be followed"
        )
    return inputs, tokens, offsets[first:]


def _check_sizes(config, images: list) -> None:
    patch = config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else max(patch)
    for one in images:
        if min(one.height, one.width) < patch:
            raise InputError(
                f"an image of {one.height} x {one.width} pixels is smaller than one patch of {config.model_type}, {patch} x {patch}: "
                f"give a larger one"
            )


def _shown(config, asked: Asked, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """For every box the columns of the prompt that show it."""
    placeholders = torch.tensor(sorted(picture_token_ids(config)))
    columns = torch.isin(inputs["input_ids"][0], placeholders).nonzero().flatten().tolist()
    sizes = [(one.height, one.width) for one in asked.images]
    grids = inputs.get("image_grid_thw")
    try:
        patches = locate(config, sizes, len(columns), None if grids is None else [tuple(grid) for grid in grids.tolist()])
    except ValueError as error:
        raise InputError(str(error)) from error
    starts = [0]
    for own in patches:
        starts.append(starts[-1] + len(own))
    return [
        [columns[starts[box.image] + index] for index in covering(patches[box.image], sizes[box.image], box)]
        for box in asked.boxes
    ]
