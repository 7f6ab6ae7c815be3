"""What the layers of one cache know together."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import MixKVConfig
from ..gate_file import Gate
from ..hf.attention import visible
from ..hf.image_tokens import ImageTokens
from ..selection.global_budget import ChunkBudget, GlobalBudget
from .progress import Progress
from .turn import Turn

# Attributes in pickles of version 0.1.0.
_FORMER = {"recording": "rollback_enabled", "waiting": "pending_layer", "contest": "shared_budget"}


@dataclass
class Before:
    """What a forward may change besides the layers, as it was before; ``seen``: tokens of every layer.

    ``images``: None until it is known which of its tokens are images.
    """

    seen: int
    batch: int | None
    prompt_length: int | None
    rollback_enabled: bool
    expected_prompt: int | None = None
    turn: Turn | None = None
    images: ImageTokens | None = None


@dataclass
class CacheState:
    """What the layers of one cache share.

    ``prompt_length``: tokens of a prompt that arrives in several forwards or with drafts attached; None: one forward.
    ``expected_prompt``: the length of the next prompt or turn, if the caller gave it.
    ``turn``: the later turn being read, or read last, if it is one that is compressed.
    ``rollback_enabled``: tokens may be taken back by `crop` after each forward (assisted decoding).
    ``pending_layer``: the layer whose keys have been handed out and not come to the attention function yet.
    ``shared_budget``: what the layers of a prompt compete for, if the method is cross-layer, until its last layer has come.
    ``valid``: real tokens by (first position, tokens), of the present forward: its masks are read once, not once a layer.
    ``images``: which tokens are image tokens.
    ``progress``: which layers the present forward has reached; None in a pickle of version 0.1.0, until its cache sets it.
    ``before``: what the present forward may change besides the layers, as it was.
    ``storing``: whether the present forward has begun to change what a layer holds.
    ``replay``: the part of the prompt that the present forward repeats; None: it reads new tokens.
    ``gate``: of the model, where the score needs it.
    ``cache``: whose layers these are, while a forward runs.
    """

    config: MixKVConfig
    num_layers: int = 0
    prompt_length: int | None = None
    expected_prompt: int | None = None
    turn: Turn | None = None
    rollback_enabled: bool = False
    pending_layer: Any | None = None
    shared_budget: GlobalBudget | ChunkBudget | None = None
    valid: dict[tuple[int, int], torch.Tensor | None] = field(default_factory=dict, repr=False)
    images: ImageTokens = field(default_factory=ImageTokens, repr=False)
    progress: Progress | None = field(default_factory=Progress, repr=False)
    before: Before | None = field(default=None, repr=False)
    storing: bool = False
    replay: Any | None = None
    gate: Gate | None = field(default=None, repr=False)
    cache: weakref.ref | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "valid": {}, "before": None, "cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        renamed = {_FORMER.get(name, name): value for name, value in state.items()}
        missing = {
            "progress": None,
            "before": None,
            "storing": False,
            "replay": None,
            "gate": None,
            "cache": None,
            "turn": None,
        }
        self.__dict__.update(missing | renamed)

    @property
    def keeps_window(self) -> bool:
        """Whether layers hold the last window of queries between forwards, to score what they hold."""
        return self.config.decode_budget is not None or self.config.turns == "all"

    def reads_turn(self, seen: int) -> bool:
        """Whether, after so many tokens, a later turn has not been read to its end."""
        return self.turn is not None and seen < self.turn.end

    def start_storing(self) -> None:
        """The present forward is about to change what a layer holds."""
        self.storing = True

    def valid_tokens(self, mask: torch.Tensor | None, start: int, count: int) -> torch.Tensor | None:
        """Which of the last ``count`` tokens that ``mask`` covers are real: bool [B, count], or None if all are.

        ``start``: the position of the first of them. The mask may be another layer's on another device: all say the same within
        a forward.

        Raises:
            ValueError: the last one is not (padding on the right).
        """
        if mask is None:
            return None
        if (start, count) in self.valid:
            valid = self.valid[start, count]
            return None if valid is None else valid.to(mask.device)
        valid = mask if mask.ndim == 2 else mask[:, 0, -1]
        valid = visible(valid) if mask.ndim == 4 else valid.bool()
        valid = valid[:, -count:]
        if not valid[:, -1].all():
            rows = (~valid[:, -1]).nonzero().flatten().tolist()
            raise ValueError(f"batch rows {rows} are padded on the right: set tokenizer.padding_side = 'left'")
        valid = None if valid.all() else valid
        self.valid[start, count] = valid
        return valid


# The name in pickles of version 0.1.0.
Shared = CacheState
