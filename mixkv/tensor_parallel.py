"""Tensor parallelism: every process holds some of a layer's KV heads, and what heads compete for is agreed between them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn

# Attention module -> the mesh of the processes that share its heads out. Goes with the module.
_meshes: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def learn(mesh: Any, attention: Iterable[nn.Module]) -> None:
    """Remembers the mesh of processes that ``attention`` modules are spread over; None: one process."""
    if mesh is not None:
        _meshes.update(dict.fromkeys(attention, mesh))


@dataclass(frozen=True)
class HeadShard:
    """The KV heads of a layer that this process holds: ``heads`` of ``total``, in equal parts in the order of the ranks.

    ``rank``: this process's, of so many ``processes`` of the ``group`` that runs the layer together. Some models keep all heads
    in every process: ``heads == total`` though there are several.
    """

    heads: int
    total: int
    rank: int = 0
    processes: int = 1
    group: Any = None

    @property
    def first(self) -> int:
        """The first head held, counted over all processes."""
        return self.rank * self.heads if self.sharded else 0

    @property
    def sharded(self) -> bool:
        return self.heads < self.total

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """The heads held [..., heads] of ``whole`` [..., total]."""
        return whole[..., self.first : self.first + self.heads]

    def gather(self, by_head: torch.Tensor, partial: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What all processes have, with one all-gather; to be called by all of them.

        Args:
            by_head: float32 [B, heads, ...].
            partial: float32, of the same shape everywhere.

        Returns: ``by_head`` of all heads, [B, total, ...], to the bit; and the sum of ``partial``.
        """
        sent = ([by_head] if self.sharded else []) + ([] if partial is None else [partial])
        if self.processes == 1 or not sent:
            return by_head, partial
        found = self._all_gather(torch.cat([tensor.flatten() for tensor in sent]))
        pieces = found.split([tensor.numel() for tensor in sent], dim=1)
        found = [piece.reshape(self.processes, *tensor.shape) for piece, tensor in zip(pieces, sent)]
        whole = found[0].transpose(0, 1).flatten(1, 2) if self.sharded else by_head
        return whole, None if partial is None else found[-1].sum(dim=0)

    def columns(self, part: torch.Tensor) -> torch.Tensor:
        """The matrix [n, columns] of which every process has an equal part [n, columns / processes], in the order of the ranks."""
        return self._all_gather(part.contiguous()).transpose(0, 1).flatten(1)

    def _all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """[processes, ...] of ``mine`` [...]."""
        found = mine.new_empty(self.processes, *mine.shape)
        torch.distributed.all_gather(list(found), mine, group=self.group)
        return found


def shard_of(module: nn.Module | None, heads: int) -> HeadShard:
    """Which heads of its layer an attention module holds whose keys have so many ``heads``.

    Raises:
        ValueError: neither all heads of the layer nor an equal share of them, or a share in unknown company.
    """
    mesh = None if module is None else _meshes.get(module)
    query_heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    total = query_heads // module.num_key_value_groups if isinstance(query_heads, int) else heads
    if mesh is None:
        if heads < total and torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ValueError(
                f"{type(module).__name__} holds {heads} of {total} KV heads, and it is not known which processes hold the others: "
                f"load the model with transformers' tp_plan, and make the cache for all of it: MixKVCache(model)"
            )
        return HeadShard(heads, heads)
    if total not in (heads, heads * mesh.size()):
        raise ValueError(
            f"{type(module).__name__} holds {heads} of {total} KV heads in one of {mesh.size()} processes: only equal shares, or all "
            f"heads in every process, are supported. Use a number of processes that divides {total}"
        )
    return HeadShard(heads, total, mesh.get_local_rank(), mesh.size(), mesh.get_group())


def is_spread(module: nn.Module | None) -> bool:
    """Whether an attention module of a bound model is run by several processes."""
    return module in _meshes if module is not None else False


class RemoteLengths:
    """How many rows all heads of a layer hold, in this and in the other processes, known without asking them.

    All heads of a batch row gain and lose the same number of rows, except in a compression: so it is enough to know how they
    differed after the last.

    Args:
        shard: which of the heads are held here.
        rows: int64 [B, total], rows kept of each head, or so many more or fewer for all heads of a batch row.
    """

    def __init__(self, shard: HeadShard, rows: torch.Tensor):
        self.parts = shard.total // shard.heads
        self.beyond = rows - rows[:, shard.first : shard.first + 1]
        self.excess = (rows.sum(dim=1) - self.parts * shard.own(rows).sum(dim=1)).tolist()

    def lengths(self, own: torch.Tensor) -> torch.Tensor:
        """Rows of all heads [B, total], from those of the heads held here [B, heads]."""
        return own[:, :1] + self.beyond

    def totals(self, own: list[int]) -> list[int]:
        """Rows of all heads together for every batch row, from those held here."""
        return [self.parts * count + excess for count, excess in zip(own, self.excess)]

    def take_rows(self, rows: list[int]) -> None:
        self.beyond = self.beyond[rows]
        self.excess = [self.excess[row] for row in rows]
