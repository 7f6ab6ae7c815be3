"""Tasks on rendered pages: a page, and a question about values on it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from ..document import page, questions
from ..hf.image_tokens import image_token_ids
from .prompts import Reading, adds_special_tokens
from .tasks import Sample

# What was not in the document model's training: the words, ...; "fresh": only the seed.
VARIANTS = ("fresh", "words", "phrasing", "layout", "font")
# Number of values that a question asks for.
KEYS = (2, 3, 4)
# Number of questions about a page that is compressed before its questions are known.
LATER_QUESTIONS = 2


def sample(kind: str, loaded, seed: int, *, later: bool = False, variant: str = "fresh", keys: Sequence[int] = KEYS) -> Sample:
    """A page and a question about it.

    Args:
        kind: of `mixkv.document.page.NAMES`.
        loaded: a vision-language model. The reference is the true answer for the document model, which was trained to give it
            word by word, and the answer of the full cache for other models.
        later: whether the page is compressed before its two questions are known, or together with one question.
        variant: of `VARIANTS`.
        keys: the possible numbers of values that a question asks for.

    Raises:
        ValueError: unknown kind or variant.
    """
    from ..document import render

    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
    layout = page.HELD_OUT_LAYOUT if variant == "layout" else None
    document = page.make(kind, f"asked {seed}", layout=layout, held_out_words=variant == "words")
    font = render.HELD_OUT_FONT if variant == "font" else None
    images = [render.draw(one, f"asked {seed} {number}", font=font) for number, one in enumerate(document.pages)]
    chance = random.Random(f"questions {kind} {seed}")
    facts = [questions.draw_facts(document, chance, chance.choice(keys)) for _ in range(LATER_QUESTIONS if later else 1)]
    phrasings = ["held out" if variant == "phrasing" else chance.randrange(4) for _ in facts]
    asked = [questions.ask(document, some, phrasing) for some, phrasing in zip(facts, phrasings)]
    whole = [_read(loaded, images, question) for question in asked]
    ids = [one["input_ids"][0].tolist() for one in whole]
    # The context ends with the last image token if the questions come later, else before the last token.
    known = _last_patch(ids[0], loaded.model.config) + 1 if later else len(ids[0]) - 1
    truth = [questions.answer(some) for some in facts]
    answer = None
    if loaded.knows_pages:
        answer = [loaded.tokenizer(f" {text}{questions.END.strip()}")["input_ids"] for text in truth]
    inputs = {name: value for name, value in whole[0].items() if name not in ("input_ids", "attention_mask")}
    return Sample(ids[0][:known], [one[known:] for one in ids], answer, truth, inputs=inputs)


def demo(loaded) -> Reading:
    """A filled form, and a question about three of its fields."""
    from ..document import render

    document = page.make("form", "demo", layout=2)
    images = [render.draw(one, "demo") for one in document.pages]
    facts = random.Random("demo").sample(document.facts, 3)
    question = questions.ask(document, facts)
    inputs = dict(_read(loaded, images, question))
    return Reading(
        inputs.pop("input_ids"),
        f"{question} (On the page: {questions.answer(facts)})",
        {name: value for name, value in inputs.items() if name != "attention_mask"},
        images,
    )


def _read(loaded, images: list, question: str) -> dict:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = loaded.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    special = adds_special_tokens(loaded.tokenizer, text)
    return loaded.processor(images=images, text=text, add_special_tokens=special, return_tensors="pt")


def _last_patch(ids: list[int], config) -> int:
    patches = image_token_ids(config)
    return max(position for position, token in enumerate(ids) if token in patches)


# As `tasks.TASKS`, but with a vision-language model as argument: ``(loaded, seed) -> Sample``.
TASKS: dict[str, Callable[..., Sample]] = {
    f"{kind.replace(' ', '-')}{'-later' if later else ''}": partial(sample, kind, later=later)
    for later in (False, True)
    for kind in page.NAMES
}
