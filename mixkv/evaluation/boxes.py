"""Pages, the boxes that show the answer to a question about them, and the answer tokens and image tokens of each box."""

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

# Kinds of pages that show the words of the answer. (The answers about a screen are positions on it.)
KINDS = {kind.replace(" ", "-"): kind for kind in page.NAMES if kind != "screen"}
# The document model was trained to answer like this; other models are instructed to.
TERSE = " Answer with nothing but the values as they stand on the page, separated by commas."
# Overlap that neighboring patches may have from rounding alone, relative to the image's height or width.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Box:
    """The part of an image that shows some characters of an answer.

    Attributes:
        start, end: the characters ``answer[start:end]``.
        image: index of the image.
        top, left, bottom, right: in pixels of that image.
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
    """PIL images, a question about them and its answer, with a box for all characters of the answer that the images show."""

    images: list
    question: str
    answer: str
    boxes: list[Box]


@dataclass(frozen=True)
class Target:
    """An answer token, and the tokens of the prompt that show the same characters.

    Attributes:
        position: of the answer token in the prompt.
        token: its id.
        shown: positions of the image tokens, or text tokens, that show its characters.
    """

    position: int
    token: int
    shown: tuple[int, ...]


@dataclass(frozen=True)
class Aligned:
    """A model's inputs for a question and its answer (input_ids [1, N] and so on), and the answer tokens that are shown."""

    inputs: dict[str, torch.Tensor]
    targets: list[Target]


def make(kind: str, seed: int, *, terse: bool = True) -> Asked:
    """A page of a kind in `KINDS`, made from a seed, and a question about two to four values on it.

    The pages differ from those of `mixkv eval` for the same seeds. ``terse``: the question asks for the values only.
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
    """The inputs of question and answer for ``loaded``, and for each answer token in a box the image tokens that show it.

    A token with characters of several boxes is shown by all of them. A token whose boxes the processor cropped off is no target.

    Raises:
        InputError: the model or its processor cannot read the images or the question; the message says why.
    """
    text = _text(loaded.processor, asked)
    start = len(text) - len(asked.answer)
    inputs, tokens, offsets = _encode(loaded, asked.images, text, start)
    shown = _shown(loaded.model.config, asked, inputs)
    first = inputs["input_ids"].shape[1] - len(tokens)
    targets = []
    for index, (token, (low, high)) in enumerate(zip(tokens, offsets)):
        spelled = [
            positions for box, positions in zip(asked.boxes, shown) if box.start < high - start and low - start < box.end
        ]
        if positions := set().union(*spelled):
            targets.append(Target(first + index, token, tuple(sorted(positions))))
    return Aligned(inputs, targets)


def covering(patches: Sequence[Patch | None], size: tuple[int, int], box: Box) -> list[int]:
    """The indices of the patches that show any part of a box, in any view of the image of ``size`` (height, width)."""
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
    """The tokenizer's encoding of ``text``, with the characters of each token (``offset_mapping``).

    Raises:
        InputError: the tokenizer cannot map tokens to characters.
    """
    try:
        return tokenizer(text, return_offsets_mapping=True, **options)
    except NotImplementedError as error:
        raise InputError(
            f"{type(tokenizer).__name__} cannot map tokens to characters: use a model with a fast tokenizer"
        ) from error


def _text(processor, asked: Asked) -> str:
    """The prompt followed by the answer."""
    content = [*({"type": "image"} for _ in asked.images), {"type": "text", "text": asked.question}]
    turns = [{"role": "user", "content": content}]
    said = {"role": "assistant", "content": [{"type": "text", "text": asked.answer}]}
    try:
        before = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        both = processor.apply_chat_template([*turns, said], tokenize=False)
    except ValueError as error:
        raise InputError(
            f"{type(processor).__name__} cannot format a question about an image ({error}): use a chat model"
        ) from error
    # The template may put a space between its generation prompt and the answer.
    between, found, _ = both.removeprefix(before).partition(asked.answer)
    between = between if both.startswith(before) and found and not between.strip() else ""
    return before + between + asked.answer


def _encode(loaded: Loaded, images: list, text: str, start: int) -> tuple[dict, list[int], list[tuple[int, int]]]:
    """The processor's outputs; and the tokens from character ``start`` on, with the characters of each."""
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
            f"the prompt of {loaded.name} has no image tokens: its chat template omits images, or the model reads them by cross-attention, "
            f"which is not compressed. Use another model"
        )
    offsets = [tuple(pair) for pair in alone["offset_mapping"]]
    first = next(index for index, (_, high) in enumerate(offsets) if high > start)
    tokens = alone["input_ids"][first:]
    if tokens != ids[len(ids) - len(tokens) :]:
        raise InputError(f"{type(processor).__name__} and its tokenizer encode the answer differently: use another model")
    return inputs, tokens, offsets[first:]


def _check_sizes(config, images: list) -> None:
    patch = config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else max(patch)
    for one in images:
        if min(one.height, one.width) < patch:
            raise InputError(
                f"an image of {one.height} x {one.width} pixels is smaller than one patch of {config.model_type}, {patch} x {patch}: "
                f"give a larger image"
            )


def _shown(config, asked: Asked, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """For every box the positions of the image tokens that show it."""
    placeholders = torch.tensor(sorted(picture_token_ids(config)))
    positions = torch.isin(inputs["input_ids"][0], placeholders).nonzero().flatten().tolist()
    sizes = [(one.height, one.width) for one in asked.images]
    grids = inputs.get("image_grid_thw")
    try:
        patches = locate(config, sizes, len(positions), None if grids is None else [tuple(grid) for grid in grids.tolist()])
    except ValueError as error:
        raise InputError(str(error)) from error
    starts = [0]
    for own in patches:
        starts.append(starts[-1] + len(own))
    return [
        [positions[starts[box.image] + index] for index in covering(patches[box.image], sizes[box.image], box)]
        for box in asked.boxes
    ]
