"""Tasks made from seeds: contexts, questions and answers. Prose is from Python's manual, facts are made up.

A task is a function ``(tokenizer, tokens, seed) -> Sample``. All are plain text to be completed, so that they suit base
models too. Even and odd seeds use different halves of the manual's topics: choices made on even seeds can be evaluated on odd
ones.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from . import InputError

_THINGS = (
    "vault locker server elevator printer archive garage terminal cabinet gate engine bunker safe hangar studio kiosk".split()
)
_FIRST = "Ada Boris Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karin Louis Mara Nils Olga Pavel".split()
_JOBS = "nurse pilot baker tailor lawyer farmer painter singer plumber judge miner sailor".split()
_TOWNS = "Lisbon Oslo Cairo Lima Delhi Quito Turin Kyoto Perth Dakar Riga Sofia".split()
_PETS = "parrot cat horse turtle rabbit goat ferret dog canary snake".split()


@dataclass(frozen=True)
class Sample:
    """A context, questions about it, and their answers.

    Attributes:
        context: token ids read before compression.
        follow: token ids fed after the context, a list per question; the answer is predicted after the last of them.
        answer: the true answer to each question, as token ids; None: the reference is the full cache's own greedy answer.
        expected: for each question the text that a correct answer contains; None if there is no correct answer.
        depth: position of the answer in the context, in [0, 1], if the task varies it.
        inputs: further inputs of the model for the context, such as pixel_values.
    """

    context: list[int]
    follow: list[list[int]]
    answer: list[list[int]] | None = None
    expected: list[str] | None = None
    depth: float | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


def codes(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> Sample:
    """Four codes hidden in prose, and a question about one of them."""
    chance = random.Random(f"codes {seed}")
    names, numbers = chance.sample(_THINGS, 4), [str(chance.randint(10000, 99999)) for _ in range(4)]
    facts = [f"The code of the {name} is {number}." for name, number in zip(names, numbers)]
    asked = chance.randrange(4)
    question = f"What is the code of the {names[asked]}? The code of the {names[asked]} is"
    ids = _ids(tokenizer, f"{_hide(tokenizer, tokens, chance, seed, facts, question)}\n\n{question}")
    return Sample(ids[:-1], [ids[-1:]], None, [numbers[asked]])


def needle(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> Sample:
    """One code hidden in prose. The depth is 0, 1/4, ... 1 in turn, over the seeds of the same parity."""
    chance = random.Random(f"needle {seed}")
    name, number = chance.choice(_THINGS), str(chance.randint(10000, 99999))
    depth = seed // 2 % 5 / 4
    fact, question = f"The code of the {name} is {number}.", f"What is the code of the {name}? The code of the {name} is"
    sentences = "".join(_around(tokenizer, tokens, chance, seed, f"{fact} {question}")).split(". ")
    sentences.insert(round(depth * len(sentences)), fact.rstrip("."))
    ids = _ids(tokenizer, ". ".join(sentences).strip() + f".\n\n{question}")
    return Sample(ids[:-1], [ids[-1:]], None, [number], depth)


def lookup(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> Sample:
    """A table of 32 words and their values within prose, and a question about one of them."""
    chance = random.Random(f"lookup {seed}")
    words = sorted(set(re.findall(r"\b[a-z]{6,9}\b", _manual(seed))))
    values = {word: chance.choice(_TOWNS + _PETS + _JOBS) for word in chance.sample(words, 32)}
    asked = chance.choice(list(values))
    table = "\n".join(f"{word} = {value}" for word, value in values.items())
    before, after = _around(tokenizer, tokens, chance, seed, f"{table}\n\n{asked} =")
    ids = _ids(tokenizer, f"{before}\n\n{table}\n\n{after}\n\n{asked} =")
    return Sample(ids[:-1], [ids[-1:]], None, [values[asked]])


def prose(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int, following: int = 32) -> Sample:
    """Prose and its true continuation, without a question."""
    chance = random.Random(f"prose {seed}")
    ids = _ids(tokenizer, _passage(chance, seed, 8 * (tokens + following)))
    return Sample(ids[: tokens - 1], [ids[tokens - 1 : tokens]], [ids[tokens : tokens + following]])


def several(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> Sample:
    """Facts about four people hidden in prose, compressed before the questions, one about each fact."""
    chance = random.Random(f"several {seed}")
    facts, questions, answers = [], [], []
    for name in chance.sample(_FIRST, 4):
        kind, choices = chance.choice([("job", _JOBS), ("home town", _TOWNS), ("pet", _PETS)])
        answers.append(chance.choice(choices))
        facts.append(f"The {kind} of {name} is {answers[-1]}.")
        questions.append(f"What is the {kind} of {name}? The {kind} of {name} is")
    text = _hide(tokenizer, tokens, chance, seed, facts, max(questions, key=len))
    return _asked(tokenizer, text, [f"\n\n{question}" for question in questions], answers)


TASKS: dict[str, Callable[..., Sample]] = {
    "needle": needle,
    "codes": codes,
    "lookup": lookup,
    "prose": prose,
    "several": several,
}


def from_file(tokenizer: PreTrainedTokenizerBase, path: str) -> list[Sample]:
    """Samples from a file of JSON lines: ``{"context": ..., "question": ..., "answer": ...}``.

    ``question`` may be a list of questions, ``answer`` then one of answers; without a question the answer continues the
    context. The context is compressed before the question is known.

    Raises:
        InputError: the file cannot be read, or a line is invalid; the message names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"--data {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path} is not UTF-8 text (byte {error.start})") from error
    samples = [
        _from_line(tokenizer, f"--data {path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not samples:
        raise InputError(f"--data {path} has no samples: use JSON lines with context, question and answer")
    return samples


def _from_line(tokenizer: PreTrainedTokenizerBase, where: str, line: str) -> Sample:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg}") from error
    if not isinstance(item, dict):
        raise InputError(f"{where} is not a JSON object with context, question and answer")
    for name in ("context", "answer"):
        if name not in item:
            raise InputError(f"{where} has no {name!r}")
    questions, answers = item.get("question", ""), item["answer"]
    if isinstance(questions, str) and isinstance(answers, str):
        questions, answers = [questions], [answers]
    texts = [item["context"], *questions, *answers] if isinstance(questions, list) and isinstance(answers, list) else [None]
    if not all(isinstance(text, str) for text in texts) or len(questions) != len(answers) or not item["context"].strip():
        raise InputError(f"{where} must have a context (text), and a question and an answer (text, or lists of equal length)")
    return _asked(tokenizer, item["context"], [f"\n\n{text}" if text else "" for text in questions], answers)


def _asked(tokenizer: PreTrainedTokenizerBase, text: str, follow: list[str], expected: list[str]) -> Sample:
    """A sample whose context is ``text``, compressed before any of ``follow`` is known."""
    whole = [_ids(tokenizer, text + part) for part in follow]
    # The last token of the text may merge with the text that follows; at least one token must follow.
    known = list(zip(_ids(tokenizer, text), *whole))
    shared = next((i for i, ids in enumerate(known) if len(set(ids)) > 1), len(known))
    shared = min(shared, min(map(len, whole)) - 1)
    return Sample(whole[0][:shared], [ids[shared:] for ids in whole], None, expected)


def _hide(
    tokenizer: PreTrainedTokenizerBase, tokens: int, chance: random.Random, seed: int, facts: list[str], question: str
) -> str:
    """Prose with ``facts`` spread over it; with ``question`` it has about ``tokens`` tokens."""
    sentences = "".join(_around(tokenizer, tokens, chance, seed, " ".join([*facts, question]))).split(". ")
    step = len(sentences) / len(facts)
    for number, fact in reversed(list(enumerate(facts))):
        sentences.insert(int(step * (number + chance.random())), fact.rstrip("."))
    return ". ".join(sentences).strip() + "."


def _around(tokenizer: PreTrainedTokenizerBase, tokens: int, chance: random.Random, seed: int, given: str) -> tuple[str, str]:
    """Prose in two parts, which together with the text ``given`` have about ``tokens`` tokens."""
    room = max(tokens - len(_ids(tokenizer, given)) - 6, 2)
    ids = tokenizer(_passage(chance, seed, 8 * tokens), add_special_tokens=False)["input_ids"][:room]
    cut = chance.randrange(1, room)
    return tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])


def _passage(chance: random.Random, seed: int, characters: int) -> str:
    """``characters`` characters of the manual from a random paragraph on."""
    manual = _manual(seed)
    start = manual.index("\n\n", chance.randrange(len(manual) - characters - 4000)) + 2
    # The manual breaks lines at 70 characters: join them.
    return " ".join(manual[start : start + characters].split())


def _manual(seed: int) -> str:
    """The half of the manual's topics for the parity of ``seed``."""
    from pydoc_data.topics import topics

    names = sorted(topics, key=lambda name: (len(topics[name]), name))
    return "\n\n".join(topics[name] for name in names[seed % 2 :: 2])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids, with the tokenizer's special tokens."""
    return tokenizer(text)["input_ids"]
