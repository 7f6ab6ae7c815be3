"""The sizes of the caches of an evaluation, so that its report shows whether anything was compressed."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch

from ..cache import MixKVCache


class Tally:
    """Sums over caches, one per prompt or batch of prompts."""

    def __init__(self) -> None:
        self._tokens: list[float] = []
        self._rows: list[float] = []
        self._bytes: list[int] = []
        self._bytes_full: list[int] = []

    def add(self, cache: MixKVCache, attention_mask: torch.Tensor | None = None) -> None:
        """Adds the present size of ``cache``. Padding, which ``attention_mask`` [B, N] marks, does not count as tokens."""
        padding = 0.0 if attention_mask is None else (attention_mask == 0).sum(1).double().mean().item()
        numbers = cache.stats()
        lengths = [layer.double().mean().item() for layer in numbers["lengths"] if layer is not None]
        self._tokens.append(numbers["seen"] - padding)
        self._rows.append(mean(lengths))
        self._bytes.append(numbers["bytes"])
        self._bytes_full.append(numbers["bytes_full"])

    def report(self) -> dict[str, Any]:
        """The sums and means so far.

        Returns: a dict with
            caches: their number; compressed: the number of caches with fewer KV entries than tokens;
            tokens, rows_per_head: tokens seen, and KV entries kept per KV head, mean over batch rows; None without caches;
            bytes_ratio: bytes of all caches relative to full caches; None without caches.
        """
        return {
            "caches": len(self._rows),
            "compressed": sum(rows < tokens - 1e-6 for rows, tokens in zip(self._rows, self._tokens)),
            "tokens": mean(self._tokens) if self._tokens else None,
            "rows_per_head": mean(self._rows) if self._rows else None,
            "bytes_ratio": sum(self._bytes) / sum(self._bytes_full) if self._bytes_full else None,
        }

    def warning(self, budget: int | float | str) -> str | None:
        """A warning if there were prompts and none was compressed; else None."""
        if not self._rows or self.report()["compressed"]:
            return None
        return (
            f"mixkv compressed none of the prompts: the longest has {max(self._tokens):.0f} tokens, within budget={budget}. The "
            f"results are those of the full cache; lower the budget or use longer prompts"
        )
