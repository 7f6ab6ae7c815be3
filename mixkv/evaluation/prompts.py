"""Texts and token ids: the demo's text and question, text files, chat templates, filler for timing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import InputError

_TOPIC = "execmodel"
_LENGTH = 8200
_FACT = "By the way, the secret ingredient of grandmother's soup is a spoonful of honey."
_QUESTION = "What is the secret ingredient of grandmother's soup?"

# A fact, a question about it that it answers, and the word of the answer.
_LATER = [
    ("The pet of Olga is a parrot.", "What is the pet of Olga? The pet of Olga is a", "parrot"),
    ("The home town of Hugo is Lisbon.", "What is the home town of Hugo? The home town of Hugo is", "Lisbon"),
    ("The pet of Nils is a turtle.", "What is the pet of Nils? The pet of Nils is a", "turtle"),
    ("The job of Irene is baker.", "What is the job of Irene? The job of Irene is", "baker"),
    ("The code of the vault is 90657.", "What is the code of the vault? The code of the vault is", "90657"),
]


@dataclass(frozen=True)
class Prompt:
    """A long text, and a question about it or None."""

    text: str
    question: str | None = None


@dataclass(frozen=True)
class Reading:
    """The inputs of a model for one prompt.

    Attributes:
        input_ids: [1, N].
        question: the question as text, to be printed; None if there is none.
        inputs: further inputs of the model, such as pixel_values.
        images: PIL images of the prompt, in order.
    """

    input_ids: torch.Tensor
    question: str | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    images: list = field(default_factory=list)


def demo() -> Prompt:
    """A chapter of Python's manual, about 1,900 tokens, with one unrelated sentence inserted in the middle."""
    from pydoc_data.topics import topics

    paragraphs = topics[_TOPIC][:_LENGTH].split("\n\n")
    middle = len(paragraphs) // 2
    return Prompt("\n\n".join([*paragraphs[:middle], _FACT, *paragraphs[middle:]]), _QUESTION)


@dataclass(frozen=True)
class Later:
    """A text that is read before its questions are known: ``questions`` of a question and a word of the answer each."""

    text: str
    questions: list[tuple[str, str]]


def demo_later() -> Later:
    """The chapter of `demo` with five facts spread over it, and a question about each."""
    from pydoc_data.topics import topics

    paragraphs = topics[_TOPIC][:_LENGTH].split("\n\n")
    step = len(paragraphs) / len(_LATER)
    for number, (fact, _, _) in reversed(list(enumerate(_LATER))):
        paragraphs.insert(int(step * (number + 0.5)), fact)
    return Later("\n\n".join(paragraphs), [(question, answer) for _, question, answer in _LATER])


def read(path: str, question: str | None = None) -> Prompt:
    """A text file as a prompt.

    Raises:
        InputError: the file is missing, empty or not UTF-8 text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompt-file {path} is not UTF-8 text (byte {error.start}): convert it, e.g. with iconv -t UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"--prompt-file {path} cannot be read: {error.strerror}; give the path of a text file") from error
    if not text:
        raise InputError(f"--prompt-file {path} is empty: give a text longer than the budget")
    return Prompt(text, question)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, chat: bool = True) -> torch.Tensor:
    """Token ids [1, N] of a prompt as one user turn, or with ``chat=False`` as plain text.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    text = prompt.text if prompt.question is None else f"{prompt.text}\n\n{prompt.question}"
    if not chat:
        return tokenizer(text, return_tensors="pt")["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this model's tokenizer has no chat template: use an instruction-tuned model, or pass --no-chat")
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]


def adds_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the tokenizer should add special tokens to the output of a chat template: not if that begins with one."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def filler(tokenizer: PreTrainedTokenizerBase, count: int, batch: int = 1) -> torch.Tensor:
    """English text as token ids [batch, count], the same in every batch row."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in ("specialnames", "compound", "types"))
    # Enough characters for ``count`` tokens, so that a short filler does not tokenize the whole text.
    ids = tokenizer(text[: 8 * count])["input_ids"]
    repeated = ids * (1 + count // len(ids))
    return torch.tensor(repeated[:count]).repeat(batch, 1)


def check_length(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Checks that a prompt and ``new_tokens`` do not exceed the model's context.

    Raises:
        InputError: they do.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise InputError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} more exceed the model's context of {limit}: shorten the prompt, or "
            f"use a model with a longer context"
        )
