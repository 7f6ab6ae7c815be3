"""What the layers of one cache know together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import MixKVConfig
from ..hf.attention import visible
from ..hf.image_tokens import ImageColumns
from .global_budget import ChunkBudget, GlobalBudget


@dataclass
class Shared:
    """What the layers of one cache share.

    ``prompt_length``: columns of a prompt that arrives in several forwards or with drafts attached; None: one forward.
    ``recording``: rows may be taken back by `crop` after each forward (assisted decoding).
    ``waiting``: the layer whose keys have been handed out and not come to the attention function yet.
    ``global_budget``: the layers of a prompt under a method of `config.CONTESTS`, until its last layer has come.
    ``valid``: valid columns by (first column, columns), of the present forward: its masks are read once, not once a layer.
    ``images``: which columns are image tokens.
    """

    config: MixKVConfig
    num_layers: int = 0
    prompt_length: int | None = None
    recording: bool = False
    waiting: Any | None = None
    global_budget: GlobalBudget | ChunkBudget | None = None
    valid: dict[tuple[int, int], torch.Tensor | None] = field(default_factory=dict, repr=False)
    images: ImageColumns = field(default_factory=ImageColumns, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "valid": {}}

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
