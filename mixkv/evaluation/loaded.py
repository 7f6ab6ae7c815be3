"""A model with what is needed to read prompts."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and its tokenizer.

    Attributes:
        name: the name to print.
        processor: the processor of a vision-language model; None for a language model.
        knows_pages: whether the model was trained on the pages of `mixkv.document`, so that its answers can be compared
            with the correct ones word by word.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    processor: ProcessorMixin | None = None
    knows_pages: bool = False
