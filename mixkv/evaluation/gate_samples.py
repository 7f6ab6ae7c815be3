"""What a gate is fitted to: the contexts of evaluation tasks, texts or pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from . import InputError, pages, tasks
from .loaded import Loaded
from .measure import no_progress


def inputs(
    loaded: Loaded, kinds: Sequence[str], count: int, *, tokens: int, first_seed: int, seed_step: int, progress=no_progress
) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of ``model.generate`` for ``count`` contexts of tasks ``kinds``, in turn.

    Raises:
        InputError: an unknown kind.
    """
    for index in range(count):
        turn, place = divmod(index, len(kinds))
        kind, seed = kinds[place], first_seed + turn * seed_step
        progress(f"{kind} {seed}", count)
        if kind in tasks.TASKS:
            sample = tasks.TASKS[kind](loaded.tokenizer, tokens, seed)
        elif kind in pages.TASKS:
            sample = pages.TASKS[kind](loaded, seed)
        else:
            raise InputError(f"unknown --kind {kind!r}; choose from {', '.join([*tasks.TASKS, *pages.TASKS])}")
        ids = torch.tensor([sample.context])
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), **sample.inputs}
