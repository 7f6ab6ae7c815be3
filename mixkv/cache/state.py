"""What the layers of one cache know together."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import MixKVConfig
from ..hf.attention import visible
from ..hf.image_tokens import ImageTokens
from ..selection.global_budget import Contest, SlotContest
from .progress import Progress


@dataclass
class Before:
    """What a forward may change besides the layers, as it was before; ``seen``: tokens of every layer.

    ``images``: None until it is known which of its tokens are images.
    """

    seen: int
    batch: int | None
    prompt_length: int | None
    recording: bool
    images: ImageTokens | None = None


@dataclass
class Shared:
    """What the layers of one cache share.

    ``prompt_length``: columns of a prompt that arrives in several forwards or with drafts attached; None: one forward.
    ``expected_prompt``: the length of the next prompt, if the caller gave it.
    ``recording``: rows may be taken back by `crop` after each forward (assisted decoding).
    ``waiting``: the layer whose keys have been handed out and not come to the attention function yet.
    ``contest``: the budget that the layers of a prompt share, if the method is cross-layer, until its last layer has come.
    ``valid``: valid columns by (first column, columns), of the present forward: its masks are read once, not once a layer.
    ``images``: which columns are image tokens.
    ``progress``: which layers the present forward has reached.
    ``before``: what it found. ``storing``: whether it has begun to change what a layer holds.
    ``cache``: whose layers these are, while a forward runs.
    """

    config: MixKVConfig
    num_layers: int = 0
    prompt_length: int | None = None
    expected_prompt: int | None = None
    recording: bool = False
    waiting: Any | None = None
    contest: Contest | SlotContest | None = None
    valid: dict[tuple[int, int], torch.Tensor | None] = field(default_factory=dict, repr=False)
    images: ImageTokens = field(default_factory=ImageTokens, repr=False)
    progress: Progress | None = field(default_factory=Progress, repr=False)
    before: Before | None = field(default=None, repr=False)
    storing: bool = False
    cache: weakref.ref | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "valid": {}, "before": None, "cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Version 0.1.0 had no progress: the cache makes it, which knows its layers.
        self.__dict__.update({"progress": None, "before": None, "storing": False, "cache": None} | state)

    def valid_columns(self, mask: torch.Tensor | None, start: int, columns: int) -> torch.Tensor | None:
        """Which of the last ``columns`` columns of ``mask`` are real tokens: bool [B, columns], or None if all are.

        ``start``: the place of the first of them in the sequence. The mask may be another layer's on another device: all say
        the same within a forward.

        Raises:
            ValueError: the last one is not (padding on the right).
        """
        if mask is None:
            return None
        if (start, columns) in self.valid:
            valid = self.valid[start, columns]
            return None if valid is None else valid.to(mask.device)
        valid = mask if mask.ndim == 2 else mask[:, 0, -1]
        valid = visible(valid) if mask.ndim == 4 else valid.bool()
        valid = valid[:, -columns:]
        if not valid[:, -1].all():
            rows = (~valid[:, -1]).nonzero().flatten().tolist()
            raise ValueError(f"batch rows {rows} are padded on the right: set tokenizer.padding_side = 'left'")
        valid = None if valid.all() else valid
        self.valid[start, columns] = valid
        return valid
