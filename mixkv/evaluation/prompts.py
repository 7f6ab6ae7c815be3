"""Prompts: a long text that is always there, or the user's file, and a question about it."""

from __future__ import annotations

from pathlib import Path

import torch

from .models import Unavailable

NOTE = "By the way, the secret ingredient of grandmother's soup is a spoon of honey, added at the very end."
QUESTION = "What is the secret ingredient of grandmother's soup?"


def manual(tokenizer, tokens: int, note: str = NOTE) -> str:
    """The first ``tokens`` tokens of Python's own language reference, with a note in the middle."""
    from pydoc_data.topics import topics

    text = topics["execmodel"]
    if tokens > len(tokenizer(text).input_ids):
        text += "\n\n".join(topics[name] for name in sorted(topics) if name != "execmodel")
    text = tokenizer.decode(tokenizer(text).input_ids[:tokens], skip_special_tokens=True)
    paragraphs = text.split("\n\n")
    half = len(paragraphs) // 2
    return "\n\n".join([*paragraphs[:half], note, *paragraphs[half:]])


def read(path: str) -> str:
    """A text file.

    Raises:
        Unavailable: it is not there, is empty or not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise Unavailable(f"prompt file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Unavailable(f"prompt file {path} is not UTF-8 (byte {error.start}): convert it first") from error
    if not text.strip():
        raise Unavailable(f"prompt file {path} is empty")
    return text


def encode(tokenizer, text: str, question: str | None, *, room: int, limit: int | None) -> torch.Tensor:
    """Token ids [1, N] of text and question, through the chat template where the tokenizer has one.

    Args:
        room: tokens that will be generated; limit: the model's context length.

    Raises:
        Unavailable: prompt and answer do not fit the model's context.
    """
    content = text if question is None else f"{text}\n\n{question}"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": content}]
        content = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(content, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).input_ids
    if limit is not None and ids.shape[1] + room > limit:
        raise Unavailable(
            f"the prompt has {ids.shape[1]} tokens and {room} are to be generated, but the model's context is {limit}: shorten the text"
        )
    return ids


def context_length(model) -> int | None:
    """Tokens the model was made for, where its config tells."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
