"""What the caches of an evaluation held, so that its report tells whether anything was compressed."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch

from ..cache import MixKVCache


class Tally:
    """Counts caches: one a prompt, or one a batch of prompts."""

    def __init__(self) -> None:
        self._tokens: list[float] = []
        self._rows: list[float] = []
        self._bytes: list[int] = []
        self._bytes_full: list[int] = []

    def add(self, cache: MixKVCache, attention_mask: torch.Tensor | None = None) -> None:
        """Counts what ``cache`` holds now; the columns that ``attention_mask`` [B, N] leaves out are no tokens."""
        padding = 0.0 if attention_mask is None else (attention_mask == 0).sum(1).double().mean().item()
        numbers = cache.stats()
        lengths = [layer.double().mean().item() for layer in numbers["lengths"] if layer is not None]
        self._tokens.append(numbers["seen"] - padding)
        self._rows.append(mean(lengths))
        self._bytes.append(numbers["bytes"])
        self._bytes_full.append(numbers["bytes_full"])

    def report(self) -> dict[str, Any]:
        """What was counted.

        Returns: a dict with
            caches: how many; compressed: how many of them held fewer rows than tokens;
            tokens, rows_per_head: seen and held by a batch row, on average, None if there were no caches;
            bytes_ratio: bytes of all caches to those of full ones, None likewise.
        """
        return {
            "caches": len(self._rows),
            "compressed": sum(rows < tokens - 1e-6 for rows, tokens in zip(self._rows, self._tokens)),
            "tokens": mean(self._tokens) if self._tokens else None,
            "rows_per_head": mean(self._rows) if self._rows else None,
            "bytes_ratio": sum(self._bytes) / sum(self._bytes_full) if self._bytes_full else None,
        }

    def warning(self, budget: int | float) -> str | None:
        """What to tell if there were prompts and none was compressed."""
        if not self._rows or self.report()["compressed"]:
            return None
        return (
            f"mixkv compressed none of the prompts: the longest took {max(self._tokens):.0f} tokens, within budget={budget}. The "
            f"results are those of the full cache; lower the budget or take longer prompts"
        )
