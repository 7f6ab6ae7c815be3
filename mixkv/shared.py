"""What the layers of one cache know together."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from .attention import visible
from .config import MixKVConfig
from .contest import Contest
from .modality import ImageColumns


@dataclass
class Shared:
    """What the layers of one cache share.

    ``prompt_length``: columns of a prompt that arrives in several forwards or with drafts attached; None: one forward.
    ``recording``: rows may be taken back by `crop` after each forward (assisted decoding).
    ``waiting``: the layer whose keys have been handed out and not come to the attention function yet.
    ``contest``: the layers of a prompt under ``method="global"``, until its last layer has come.
    ``mask_memo``: (the last mask, columns, its valid columns): read once a forward, not once a layer.
    ``images``: which columns are image tokens.
    """

    config: MixKVConfig
    num_layers: int = 0
    prompt_length: int | None = None
    recording: bool = False
    waiting: Any | None = None
    contest: Contest | None = None
    mask_memo: tuple = field(default=(None, None, None), repr=False)
    images: ImageColumns = field(default_factory=ImageColumns, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mask_memo": (None, None, None)}

    def valid_columns(self, mask: torch.Tensor | None, columns: int) -> torch.Tensor | None:
        """Which of the last ``columns`` columns are real tokens: bool [B, columns], or None if all are.

        Raises:
            ValueError: the last one is not (padding on the right).
        """
        if mask is None:
            return None
        memo, memo_columns, valid = self.mask_memo
        if memo is not None and memo() is mask and memo_columns == columns:
            return valid
        valid = mask if mask.ndim == 2 else mask[:, 0, -1]
        valid = visible(valid) if mask.ndim == 4 else valid.bool()
        valid = valid[:, -columns:]
        if not valid[:, -1].all():
            rows = (~valid[:, -1]).nonzero().flatten().tolist()
            raise ValueError(f"batch rows {rows} are padded on the right: set tokenizer.padding_side = 'left'")
        valid = None if valid.all() else valid
        self.mask_memo = (weakref.ref(mask), columns, valid)
        return valid
