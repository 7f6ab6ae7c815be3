"""The parts of a layer's state: each knows how to take batch rows, how many bytes it has, and how it is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .. import tensor_parallel
from ..config import MixKVConfig
from ..ops.arguments import LogitOptions
from ..selection.context import FIRST, Measured
from ..storage import rows as stored_rows
from .row_scores import RowScores, RunningImportance

Tensors = dict[str, torch.Tensor]
Numbers = dict[str, Any]


class Part(Protocol):
    """What a layer holds of one kind.

    A class of parts has ``restore(tensors, numbers, config, dtype) -> part``, the part whose ``state`` these are, or None;
    tensors are on the layer's device and belong to the part, ``dtype`` is the model's.
    """

    nbytes: int

    def take_rows(self, rows: list[int]) -> None:
        """Makes batch row i a copy of former batch row ``rows[i]``."""

    def state(self) -> tuple[Tensors, Numbers]:
        """Tensors (not copied) and JSON values, under names that no other part has."""


class PromptSoFar:
    """Keys and values of a prompt that has not been read to its end: key [B, Hkv, tokens, D], value [B, Hkv, tokens, Dv]."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        self.key, self.value = key, value

    def joined(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """With ``key``, ``value`` of further tokens."""
        return torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)

    @property
    def nbytes(self) -> int:
        return _bytes(self.key, self.value)

    def take_rows(self, rows: list[int]) -> None:
        self.key, self.value = self.key[rows], self.value[rows]

    def state(self) -> tuple[Tensors, Numbers]:
        raise ValueError("the prompt has not been read to its end: save the cache once it has been")

    @classmethod
    def restore(cls, tensors: Tensors, numbers: Numbers, config: MixKVConfig, dtype: torch.dtype) -> None:
        return None


class WholePrompt(PromptSoFar):
    """A prompt that has been read to its end and waits for its replay, with what compresses it then.

    Attributes:
        query: [B, Hq, n, D], output: [B, n, Hq, Dv], of the last tokens.
        valid: bool [B, N], False for padding; None: there is none.
        logits: how the model computes its logits.
        replay: float32 [B, Hkv, N], the largest weight that each token has got in the replay so far.
        before: of a later turn, how many of the N rows are of tokens before it; the others are the turn's.
        samples: queries of the replay.
    """

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        query: torch.Tensor,
        output: torch.Tensor,
        valid: torch.Tensor | None,
        logits: LogitOptions,
        before: int = 0,
    ):
        super().__init__(_own(key), _own(value))
        self.before = before
        self.query, self.output, self.valid, self.logits = query, output, valid, logits
        self.replay = torch.zeros(key.shape[:3], device=key.device)
        self.samples = ReplaySamples()

    @property
    def nbytes(self) -> int:
        return super().nbytes + _bytes(self.query, self.output, self.replay, *self.samples.queries)

    @property
    def length(self) -> int:
        """Tokens that are repeated, padding included."""
        return self.key.shape[2] - self.before

    def measured(self) -> Measured:
        """What the replay measured; the prompt's first tokens, which are always needed, have the largest weight there is."""
        start = torch.zeros(self.replay.shape[0], dtype=torch.long, device=self.replay.device)
        if self.valid is not None:
            start = (~self.valid).sum(dim=1).to(start)
        position = torch.arange(self.replay.shape[2], device=start.device) - start[:, None]
        first = (position >= 0) & (position < FIRST)
        return Measured(self.replay.masked_fill(first[:, None], 1.0), self.samples.spread())


class ReplaySamples:
    """Queries of tokens spread over a replay, as many for a batch row as for its prompt alone.

    ``queries``: [B, Hq, n, D], part by part.
    """

    COUNT = 64

    def __init__(self) -> None:
        self.queries: list[torch.Tensor] = []
        self._parts: torch.Tensor | None = None

    def add(self, query: torch.Tensor, scored: torch.Tensor) -> None:
        """Takes some of ``query`` [B, Hq, p + n, D], of the tokens that ``scored`` bool [B, p + n] names: those of a part, in a row."""
        scored = scored.to(query.device)
        columns = scored.int().argmax(dim=-1, keepdim=True) + _spread(scored.sum(dim=-1))
        self.queries.append(_take(query, columns).clone())
        exists = scored.any(dim=-1).long()
        self._parts = exists if self._parts is None else self._parts + exists

    def spread(self) -> torch.Tensor | None:
        """[B, Hq, COUNT, D], from all parts that each batch row has; None: there was no replay."""
        if self._parts is None:
            return None
        return _take(torch.cat(self.queries, dim=2), _spread(self._parts * self.COUNT))


def _spread(count: torch.Tensor) -> torch.Tensor:
    """Numbers below ``count`` [B], evenly spread: int64 [B, COUNT]."""
    places = torch.arange(ReplaySamples.COUNT, device=count.device) * 2 + 1
    return (places * count.unsqueeze(-1)) // (2 * ReplaySamples.COUNT)


def _take(query: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return query.gather(2, columns[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))


class QueryWindow:
    """The last queries, which score the candidates at the next compression.

    ``query``: [B, Hq, n, D]; n is the window, and more while the prompt is being read or tokens may be taken back.
    """

    def __init__(self, query: torch.Tensor | None = None):
        self.query = query

    def append(self, query: torch.Tensor, wanted: int, valid: torch.Tensor | None = None) -> None:
        """Appends ``query`` [B, Hq, n, D] and keeps the last ``wanted``; ``valid`` [B, n], False for padding, which is left out."""
        query, new = query.detach(), query.shape[2]
        if self.query is not None:
            query = torch.cat([self.query, query], dim=2)
        if valid is not None:
            real = torch.nn.functional.pad(valid, (query.shape[2] - new, 0), value=True)
            order = real.long().argsort(dim=-1, stable=True)
            query = query.gather(2, order[:, None, :, None].expand_as(query))
        self.query = query[:, :, -wanted:].clone()

    def crop(self, count: int) -> None:
        """Removes the last ``count``."""
        self.query = self.query[:, :, : self.query.shape[2] - count]

    @property
    def nbytes(self) -> int:
        return _bytes(self.query)

    def take_rows(self, rows: list[int]) -> None:
        self.query = self.query[rows]

    def state(self) -> tuple[Tensors, Numbers]:
        return {"query_tail": self.query}, {}

    @classmethod
    def restore(cls, tensors: Tensors, numbers: Numbers, config: MixKVConfig, dtype: torch.dtype) -> QueryWindow | None:
        return cls(tensors["query_tail"]) if "query_tail" in tensors else None


@dataclass
class PromptStatistics:
    """What compression measured on the prompt.

    Attributes:
        redundancy: float32 [B, Hkv].
        modal_redundancy: float32 [B, Hkv, 2], of image keys and of text keys; None: no image, or it is not known.
        sparsity: float32 [B, Hkv]; dynamic: bool [B, Hkv], how ``hybridkv`` classified heads; else None.
        share: for every batch row, this layer's rows to those of the average layer; None: all layers alike.
        kept_share: float32 [B], the layer's entries that a threshold left to those of the prompt; None: there was no threshold.
        weighs_output: whether rows were weighed by what they add to the layer's output; None: they were not to be.
    """

    redundancy: torch.Tensor
    modal_redundancy: torch.Tensor | None = None
    sparsity: torch.Tensor | None = None
    dynamic: torch.Tensor | None = None
    share: list[float] | None = None
    weighs_output: bool | None = None
    kept_share: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return _bytes(*self._tensors().values())

    def take_rows(self, rows: list[int]) -> None:
        for name, tensor in self._tensors().items():
            setattr(self, name, tensor[rows])
        self.share = None if self.share is None else [self.share[row] for row in rows]

    def state(self) -> tuple[Tensors, Numbers]:
        return self._tensors(), {"share": self.share, "weighs_output": self.weighs_output}

    @classmethod
    def restore(cls, tensors: Tensors, numbers: Numbers, config: MixKVConfig, dtype: torch.dtype) -> PromptStatistics:
        measured = {name: tensors.get(name) for name in ("modal_redundancy", "sparsity", "dynamic", "kept_share")}
        return cls(tensors["redundancy"], **measured, share=numbers["share"], weighs_output=numbers.get("weighs_output"))

    def _tensors(self) -> Tensors:
        return {name: part for name, part in vars(self).items() if torch.is_tensor(part)}


class RemoteHeads(tensor_parallel.RemoteLengths):
    """How many rows the heads of the layer have that other processes hold (tensor parallelism)."""

    nbytes = 0
    fixed: torch.Tensor | int = 0

    def __init__(self, shard: tensor_parallel.HeadShard, rows: torch.Tensor, fixed: torch.Tensor | int = 0):
        """``rows`` [B, all heads] may still be evicted for other layers, ``fixed`` ones may not."""
        super().__init__(shard, rows + fixed)
        self.fixed = fixed

    def state(self) -> tuple[Tensors, Numbers]:
        raise ValueError("other processes hold heads of this layer: it cannot be saved")

    @classmethod
    def restore(cls, tensors: Tensors, numbers: Numbers, config: MixKVConfig, dtype: torch.dtype) -> None:
        return None


# Attribute of a layer -> its ``restore``. A layer has None where it holds nothing of a kind.
PARTS: dict[str, Callable[..., Any]] = {
    "prompt": PromptSoFar.restore,
    "rows": stored_rows.restore,
    "remote": RemoteHeads.restore,
    "window": QueryWindow.restore,
    "scores": RowScores.restore,
    "running": RunningImportance.restore,
    "statistics": PromptStatistics.restore,
}


def from_earlier(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a layer that version 0.1.0 pickled, in parts."""
    former = dict(attributes)
    dense, store, chunks, query = (former.pop(name) for name in ("dense", "store", "chunks", "query_tail"))
    measured = {
        name: former.pop(name) for name in ("redundancy", "modal_redundancy", "sparsity", "dynamic", "share", "weighs_output")
    }
    return former | {
        "prompt": None if dense is None else PromptSoFar(*dense),
        "rows": None if store is None else stored_rows.with_chunks(stored_rows.RaggedRows(store), chunks),
        "remote": former.pop("spread"),
        "window": None if query is None else QueryWindow(query),
        "statistics": None if store is None else PromptStatistics(**measured),
    }


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a copy where it is a view that keeps much more memory: some models project queries, keys and values as one."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > 1.5 * tensor.nbytes else tensor


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
