"""Decode attention by variable-length flash attention on a GPU: torch's own, or the flash-attn package's.

Each (batch row, KV head) is one sequence of a single query position with G query heads over one KV head.
"""

from __future__ import annotations

import torch

from . import reference
from .arguments import LogitOptions, RaggedBuffers


def torch_attend(
    query: torch.Tensor, buffers: RaggedBuffers, logits: LogitOptions, *, max_length: int, stride: int | None
) -> torch.Tensor:
    """`reference.attend` through `torch.nn.attention.varlen.varlen_attn` (torch >= 2.12): reads the buffers where they are."""
    from torch.nn.attention.varlen import varlen_attn

    if logits.softcap is not None or logits.sinks is not None:
        return reference.attend(query, buffers, logits, max_length=max_length, stride=stride)
    key, value, starts, lengths = buffers.key, buffers.value, buffers.starts, buffers.lengths
    folded, ends = _fold(query, starts, key.shape[0])
    out = varlen_attn(
        folded,
        key.unsqueeze(1),
        value.unsqueeze(1),
        _one_each(starts),
        ends,
        1,
        max_length,
        scale=logits.scaling,
        enable_gqa=True,
        seqused_k=lengths,
    )
    return out.reshape(query.shape[0], 1, query.shape[1], -1)


def flash_attend(
    query: torch.Tensor, buffers: RaggedBuffers, logits: LogitOptions, *, max_length: int, stride: int | None
) -> torch.Tensor:
    """`reference.attend` through ``flash_attn.flash_attn_varlen_func``.

    That function takes sequences without gaps: the rows are packed first, which costs a copy of what is stored.
    """
    from flash_attn import flash_attn_varlen_func

    if logits.sinks is not None:
        return reference.attend(query, buffers, logits, max_length=max_length, stride=stride)
    key, value, starts, lengths = buffers.key, buffers.value, buffers.starts, buffers.lengths
    # Packed to the upper bound of each length, so that the host need not know the true ones: cu_seqlens holds those.
    offsets = torch.arange(max_length, dtype=torch.int32, device=starts.device)
    ends = torch.zeros(starts.numel() + 1, dtype=torch.int32, device=starts.device)
    ends[1:] = lengths.cumsum(0)
    target = (ends[:-1].unsqueeze(1) + offsets).masked_fill(offsets >= lengths.unsqueeze(1), starts.numel() * max_length)
    rows = (starts.unsqueeze(1) + offsets).clamp(max=key.shape[0] - 1).flatten()
    size = starts.numel() * max_length + 1
    packed = [part.new_zeros(size, part.shape[1]).index_copy_(0, target.flatten().long(), part[rows]) for part in (key, value)]
    folded, _ = _fold(query, starts, key.shape[0])
    out = flash_attn_varlen_func(
        folded,
        packed[0].unsqueeze(1),
        packed[1].unsqueeze(1),
        _one_each(starts),
        ends,
        1,
        max_length,
        softmax_scale=logits.scaling,
        softcap=logits.softcap or 0.0,
    )
    return out.reshape(query.shape[0], 1, query.shape[1], -1)


def _fold(query: torch.Tensor, starts: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries as [S, G, D], and the sequences' starts with the buffer's end: int32 [S + 1]."""
    folded = query.reshape(starts.numel(), -1, query.shape[-1])
    return folded, torch.nn.functional.pad(starts, (0, 1), value=rows)


def _one_each(starts: torch.Tensor) -> torch.Tensor:
    return torch.arange(starts.numel() + 1, dtype=torch.int32, device=starts.device)
