"""A document and many questions about it in one sequence; the questions do not attend to each other."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from common import single

from mixkv.document import page, questions, words

KEYS, KEY_WEIGHTS = (1, 2, 3, 4), (2, 3, 2, 2)
# Questions per sequence: more of them cost little compared with the page.
QUESTIONS = 12


@dataclass(frozen=True)
class Asked:
    """A sequence in which each question attends to the pages and to itself only.

    Attributes:
        ids, labels: tokens [n] and what is learned of them, -100 elsewhere.
        image: which cell of the pages, -1 for none [n].
        question: number of the question, from 1 on; 0 for what all see [n].
        positions: as if the whole pages and one question were alone [n].
    """

    ids: torch.Tensor
    labels: torch.Tensor
    image: torch.Tensor
    question: torch.Tensor
    positions: torch.Tensor

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """The attention mask, added to the logits: [1, 1, n, n]."""
        seen = ((self.question == 0) | (self.question == self.question[:, None])).tril()
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)[None, None]


def ask(tokenizer, document: page.Document, chance: random.Random, bare: bool) -> Asked:
    """Random questions. ``bare`` leaves out cells without text, so that a third of the tokens remain."""
    cells = [cell for one in document.pages for row in one.cells for cell in row]
    shown = [index for index, cell in enumerate(cells) if cell in words.TEXT or not bare]
    ids = tokenizer(questions.USER)["input_ids"]
    first = len(ids)
    ids += [single(tokenizer, words.as_token(cells[index])) for index in shown]
    image = [-1] * first + shown
    common = len(ids)
    labels, number = [-100] * common, [0] * common
    positions = [*range(first), *(first + index for index in shown)]
    for turn in range(1, QUESTIONS + 1):
        facts = questions.draw_facts(document, chance, chance.choices(KEYS, KEY_WEIGHTS)[0])
        question = questions.ask(document, facts, chance.randrange(4))
        asked = tokenizer(question + questions.END + questions.ASSISTANT)["input_ids"]
        # The model does not predict the line end after an answer.
        answered = tokenizer(" " + questions.answer(facts) + questions.END)["input_ids"][:-1]
        length = len(asked) + len(answered)
        ids += asked + answered
        labels += [-100] * len(asked) + answered
        image += [-1] * length
        number += [turn] * length
        positions += range(first + len(cells), first + len(cells) + length)
    return Asked(*(torch.tensor(part) for part in (ids, labels, image, number, positions)))


def attend(module, query, key, value, attention_mask, scaling, common, **_):
    """An attention function of transformers, in plain matrix products: on a CPU in bfloat16 with a mask, forward and backward take
    half the time of torch's scaled_dot_product_attention. The first ``common`` tokens do not attend to the questions after them."""
    outputs = []
    for queries, keys in ((slice(0, common), slice(0, common)), (slice(common, None), slice(None))):
        part, mask = query[:, :, queries], attention_mask[:, :, None, queries, keys]
        batch, heads, length, width = part.shape
        shared = key.shape[1]
        weight = part.reshape(batch, shared, -1, width) @ key[:, :, keys].transpose(2, 3) * scaling
        weight = (weight.view(batch, shared, -1, *mask.shape[-2:]) + mask).softmax(-1)
        outputs.append((weight.flatten(2, 3) @ value[:, :, keys]).view(batch, heads, length, width))
    return torch.cat(outputs, 2).transpose(1, 2), None
