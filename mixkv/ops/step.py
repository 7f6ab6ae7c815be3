"""A decode step of which the host knows no length: one operation appends a row to every sequence and attends.

`reference` is the contract. Where a step is traced by torch.compile, `native` and `plain` are one opaque operation each, so that
nothing of it is copied or guarded.
"""

from __future__ import annotations

import functools

import torch

from . import reference as storage
from .arguments import FixedRoom, LogitOptions, RaggedBuffers

_SCHEMA = (
    "step(Tensor query, Tensor(a!) key_buffer, Tensor(b!) value_buffer, Tensor(c!) position_buffer, Tensor starts, "
    "Tensor(d!) lengths, Tensor(e!)? key_scale, Tensor(f!)? value_scale, Tensor ends, Tensor evicted, Tensor key, Tensor value, "
    "int max_length, float scaling, float softcap, Tensor? sinks) -> Tensor"
)


def reference(
    query: torch.Tensor,
    buffers: RaggedBuffers,
    room: FixedRoom,
    key: torch.Tensor,
    value: torch.Tensor,
    logits: LogitOptions,
    *,
    max_length: int,
) -> torch.Tensor:
    """Appends one row to every sequence and attends.

    Args:
        query: [B, Hq, 1, D].
        buffers: written, ``lengths`` included.
        room: where each sequence's rows end, and what its next position is.
        key, value: [B, Hkv, 1, D], [B, Hkv, 1, Dv].
        logits: as in the model.
        max_length: at least the largest length afterwards.

    Returns: [B, 1, Hq, Dv]. On a GPU, a sequence without room leaves its neighbours as they are.

    Raises:
        ValueError: a sequence has no room, on a CPU.
    """
    starts, lengths = buffers.starts, buffers.lengths
    last = room.ends - 1
    rows = starts + lengths
    if rows.device.type == "cpu" and (rows > last).any():
        raise ValueError(f"sequence {int((rows > last).nonzero()[0])} has no room for another row")
    rows = torch.minimum(rows, last)
    index = rows.long()
    storage.write_rows(buffers, index, key.flatten(0, 2), value.flatten(0, 2))
    buffers.position.index_copy_(0, index, lengths + room.evicted)
    torch.sub(rows, starts, out=lengths).add_(1)
    # A copy, of which nothing is remembered: in a CUDA graph the rows are found anew in every step.
    fresh = buffers._replace(starts=starts.clone())
    return storage.attend(query, fresh, logits, max_length=max_length, stride=None)


def step(
    backend: str,
    query: torch.Tensor,
    buffers: RaggedBuffers,
    room: FixedRoom,
    key: torch.Tensor,
    value: torch.Tensor,
    logits: LogitOptions,
    *,
    max_length: int,
) -> torch.Tensor:
    """`reference`, by the compiled operations where ``backend`` is ``native``, else in plain torch; `prepare` has been called."""
    operation = torch.ops.mixkv.step.default if backend == "native" else torch.ops.mixkv_plain.step.default
    sinks = None if logits.sinks is None else logits.sinks.detach().float().contiguous()
    options = (max_length, logits.scaling, logits.softcap or 0.0, sinks)
    return operation(query.detach(), *buffers, *room, key.detach(), value.detach(), *options)


@functools.cache
def prepare() -> None:
    """Makes `reference` an operation that torch.compile does not look into."""
    library = torch.library.Library("mixkv_plain", "DEF")
    library.define(_SCHEMA)
    library.impl("step", _plain, "CompositeExplicitAutograd")
    torch.library.register_fake("mixkv_plain::step", _shape, lib=library)
    _LIBRARIES.append(library)


# A library's operations are gone with it.
_LIBRARIES: list[torch.library.Library] = []


def _plain(query, *tensors_and_options):
    *tensors, key, value, max_length, scaling, softcap, sinks = tensors_and_options
    buffers, room = RaggedBuffers(*tensors[:7]), FixedRoom(*tensors[7:])
    return reference(query, buffers, room, key, value, LogitOptions(scaling, softcap or None, sinks), max_length=max_length)


def _shape(query, key_buffer, value_buffer, *rest):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value_buffer.shape[1])
