"""calibrate: fits the gate of ``score="gate"`` to a model, in closed form, from replays of a few texts or pages."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import gate_file
from .cache import MixKVCache, gates
from .cache.layer import MixKVLayer
from .hf import binding, rotary
from .read import read
from .selection.context import FIRST
from .selection.gate import GateFit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def calibrate(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | os.PathLike | None = None,
    texts: int = 8,
    tokens: int = 1024,
) -> Path:
    """Fits a gate to a model: each text is read and replayed, and the gate learns what the replay attended to.

    It takes about three prefills a text. ``score="gate"`` finds the file that is kept in mixkv's cache folder by itself.

    Args:
        model: a transformers model.
        inputs: what to read, each a dict of inputs of ``model.generate`` as the tokenizer or the processor returns them. None: pieces
            of Python's manual.
        tokenizer: for those; None: the one that belongs to the model's name.
        out: the file to write; None: one in mixkv's cache folder.
        texts, tokens: how many pieces of the manual, and how long they are.

    Returns: the path of the file, for ``MixKVConfig(gate=...)``.

    Raises:
        ValueError: a model that has no gate (tensor-parallel, or with an unknown kind of rotary embedding), or no tokenizer is found.
        OSError: the file cannot be written.
    """
    inner = binding.unwrap(model)
    modules = gates.compressed_modules(inner)
    inputs = pieces(inner, tokenizer, texts, tokens) if inputs is None else inputs
    fits: dict[int, GateFit] = {}
    kinds = list(modules.values())

    class FittingLayer(MixKVLayer):
        """Adds the rows of a prompt that has been replayed to the fit of their layer."""

        def compress(self, query, key, value, output, valid, logits, measured=None):
            if measured is not None:
                if self.ordinal not in fits:
                    fits[self.ordinal] = GateFit(rotary.partners(kinds[self.ordinal], key.shape[3]))
                real = torch.ones(key.shape[0], key.shape[2], device=key.device) if valid is None else valid
                fits[self.ordinal].add(key, value, measured.replay, real.cumsum(dim=-1) > FIRST)
            super().compress(query, key, value, output, valid, logits, measured)

    class FittingCache(MixKVCache):
        layer_class = FittingLayer

    count = 0
    for given in inputs:
        given = {name: part.to(inner.device) if torch.is_tensor(part) else part for name, part in given.items()}
        read(inner, cache=FittingCache(inner, score="replay"), progress=False, **given)
        count += 1
    if not fits:
        raise ValueError("calibrate was given nothing to read: give at least one input")
    about = {"model": inner.config.model_type, "dtype": str(inner.dtype).removeprefix("torch."), "inputs": count}
    gate = gate_file.Gate([fits[index].solve() for index in range(len(modules))], gate_file.probe(modules), about)
    path = gates.kept_path(inner) if out is None else Path(out)
    gate_file.save(gate, path)
    return path


def pieces(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, texts: int, tokens: int
) -> Iterable[dict[str, torch.Tensor]]:
    """Pieces of Python's manual of so many tokens, from places all over it.

    Raises:
        ValueError: no tokenizer is found.
    """
    from pydoc_data.topics import topics

    if tokenizer is None:
        tokenizer = _tokenizer(model)
    # The manual breaks lines at 70 characters: join them.
    manual = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    room = len(manual) // texts
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    # A replay takes as many positions again.
    tokens = tokens if longest is None else min(tokens, longest // 2 - FIRST)
    for start in range(0, room * texts, room):
        ids = tokenizer(manual[start : start + min(room, 12 * tokens)])["input_ids"][:tokens]
        yield {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def _tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    name = model.name_or_path
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer is found for {name!r}, whose gate is to be fitted: call mixkv.calibrate(model, tokenizer=...) once"
        ) from error


def _at_first_use(model: nn.Module, path: Path) -> None:
    print(f"mixkv: fitting a gate to {type(model).__name__}, once, kept as {path}", file=sys.stderr, flush=True)
    calibrate(model, out=path)


gates.MAKERS.append(_at_first_use)
