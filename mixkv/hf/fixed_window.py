"""FixedWindow: what a sliding-window layer of transformers holds, in tensors of a fixed size for compiled decode steps.

transformers' own `StaticSlidingWindowLayer` counts tokens on the host, which compiles anew when its window fills.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicSlidingWindowLayer


class FixedWindow:
    """The last rows of a layer, from the left, in ``keys`` [B, H, window, D] and ``values`` [B, H, window, Dv].

    Attributes:
        filled: int64, one element: rows that there are.
    """

    def __init__(self, layer: DynamicSlidingWindowLayer):
        batch, heads, _, size = layer.keys.shape
        self.window = layer.sliding_window
        self.keys = layer.keys.new_zeros(batch, heads, self.window, size)
        self.values = layer.values.new_zeros(batch, heads, self.window, layer.values.shape[3])
        self.filled = torch.zeros(1, dtype=torch.long, device=layer.keys.device)
        self._places = torch.arange(self.window, device=layer.keys.device)
        for tensor in (self.keys, self.values, self.filled, self._places):
            torch._dynamo.mark_static_address(tensor)

    def fits(self, layer: DynamicSlidingWindowLayer) -> bool:
        """Whether it can hold what ``layer`` does."""
        same = self.keys.dtype == layer.keys.dtype and self.keys.device == layer.keys.device
        parts = ((self.keys, layer.keys), (self.values, layer.values))
        shapes = all(own.shape[:2] == part.shape[:2] and own.shape[3] == part.shape[3] for own, part in parts)
        return same and shapes and self.window == layer.sliding_window

    def take(self, layer: DynamicSlidingWindowLayer) -> None:
        """Copies what ``layer`` holds, the ``window - 1`` tokens before the next one at most."""
        keys, values = (part[:, :, -(self.window - 1) :] for part in (layer.keys, layer.values))
        rows = keys.shape[2] if self.window > 1 else 0
        self.keys[:, :, :rows], self.values[:, :, :rows] = keys[:, :, :rows], values[:, :, :rows]
        # Masked rows are read all the same: there must be no NaN of an earlier prompt.
        self.keys[:, :, rows:].zero_(), self.values[:, :, rows:].zero_()
        self.filled.fill_(rows)

    def give_back(self, layer: DynamicSlidingWindowLayer, steps: int) -> None:
        """Brings ``layer`` to where it would be after the ``steps`` tokens that came since `take`."""
        layer.cumulative_length += steps
        rows = min(layer.keys.shape[2] + steps, self.window)
        kept = slice(max(rows - self.window + 1, 0), rows)
        layer.keys, layer.values = self.keys[:, :, kept].clone(), self.values[:, :, kept].clone()

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one row [B, H, 1, D], in place of the oldest where the window is full; returns all, filled or not."""
        rows = (self._places + (self.filled >= self.window)).clamp_(max=self.window - 1)
        last = self.filled.clamp(max=self.window - 1)
        for held, new in ((self.keys, key), (self.values, value)):
            held.copy_(held.index_select(2, rows).index_copy(2, last, new))
        self.filled.copy_((self.filled + 1).clamp_(max=self.window))
        return self.keys, self.values

    def mask_sizes(self, seen: int) -> tuple[int, int]:
        """As of the stock layer for one query after ``seen`` tokens."""
        return min(seen + 1, self.window), max(seen - self.window + 1, 0)

    def padded_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """A bool or additive ``mask`` [B, 1, 1, n] of the stock layer, with columns for rows that are not filled."""
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return F.pad(mask, (0, self.window - mask.shape[-1]), value=hidden)
