"""Questions about a document, their answers, and the chat template of the document model."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .page import Document, Fact

# The placeholder of a patch: a special token of SmolLM2 that does not occur in text.
IMAGE_TOKEN = "<filename>"

PHRASINGS = {
    "position": ("Where is {}?", "Locate {}.", "Point to {}.", "Where do I click for {}?"),
    "value": ("What is the {}?", "Give the {}.", "Tell me the {}.", "Find the {}."),
}
HELD_OUT_PHRASING = {"position": "Show me where {} is.", "value": "Please read the {} to me."}

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
# An answer begins with a space, as in training, so that its words are the same tokens as on the page.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (' ' if message['role'] == 'assistant' else '') }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '" + IMAGE_TOKEN + "' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ask(document: Document, facts: Sequence[Fact], phrasing: str | int = 0) -> str:
    """The question for ``facts``: ``phrasing`` 0 to 3, or ``"held out"``."""
    group = "position" if document.kind == "screen" else "value"
    phrase = HELD_OUT_PHRASING[group] if phrasing == "held out" else PHRASINGS[group][int(phrasing)]
    keys = [fact.key for fact in facts]
    return phrase.format(" and ".join(filter(None, (", ".join(keys[:-1]), keys[-1]))))


def answer(facts: Sequence[Fact]) -> str:
    """The correct answer: the values in the order of the question."""
    return ", ".join(fact.answer for fact in facts)


def draw_facts(document: Document, chance: random.Random, keys: int) -> list[Fact]:
    """``keys`` random facts for one question; of a table, in half of the cases from one row or column."""
    if document.kind == "table" and chance.random() < 0.5:
        of, part = chance.choice(document.facts), chance.randrange(2)
        alike = [fact for fact in document.facts if fact.key.split(" of ")[part] == of.key.split(" of ")[part]]
        return chance.sample(alike, min(keys, len(alike)))
    return chance.sample(document.facts, min(keys, len(document.facts)))
