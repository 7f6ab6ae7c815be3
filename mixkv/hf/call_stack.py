"""What is read off the frames of `generate` and of models on the call stack. Nothing else looks at frames."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import torch
from torch import nn
from transformers import PreTrainedModel


def prompt_plan() -> tuple[int | None, bool]:
    """How the calling `generate` is about to read its prompt.

    A cache sees one forward at a time: neither that more chunks of the prompt follow (``prefill_chunk_size``), nor where
    the prompt ends and the drafts of assisted decoding begin. `generate` knows, a few frames up.

    Returns: the prompt's columns if they come in several forwards or with drafts attached, else None; and whether tokens
        may be taken back after each forward (assisted decoding, which before transformers 5.15 does not tell the cache).
    """
    for frame in _frames():
        if frame.f_globals.get("__name__") != "transformers.generation.utils":
            continue
        local = frame.f_locals
        assisted = frame.f_code.co_name == "_assisted_decoding"
        chunked = frame.f_code.co_name == "_prefill" and local["generation_config"].prefill_chunk_size is not None
        if assisted or chunked:
            return local["input_ids"].shape[1], assisted
    return None, False


def thrown_away_at(length: int) -> int | None:
    """The sequence length beyond which the calling model throws away the cache whose ``length`` it is asking for; else None.

    phi3, phimoe and phi4_multimodal change their rotary embedding beyond ``original_max_position_embeddings``, and have what
    was read before read again.
    """
    caller = sys._getframe(2)
    if (
        caller.f_code.co_name != "prepare_inputs_for_generation"
        or caller.f_globals["__name__"] == "transformers.generation.utils"
    ):
        return None
    model, ids = caller.f_locals["self"], caller.f_locals.get("input_ids")
    limit = getattr(model.config, "original_max_position_embeddings", None)
    return limit if limit is not None and ids is not None and length <= limit < ids.shape[1] else None


def decline_drafts() -> None:
    """Makes the calling `generate` take none of the drafts that came along with a prompt.

    After the forward it compares them with its own choices: as ids of no token they differ from all. Only where it samples
    from an assistant model's drafts they are weighed instead, and stay.
    """
    for frame in _frames():
        if frame.f_code.co_name == "_assisted_decoding":
            local = frame.f_locals
            if not local["do_sample"] or local["candidate_logits"] is None:
                local["candidate_input_ids"][:, local["input_ids"].shape[1] :] = -1


def calling_model() -> PreTrainedModel | None:
    """The outermost transformers model whose attention module is calling, found on the stack; None if there is none."""
    attention, model = None, None
    for frame in _frames():
        caller = frame.f_locals.get("self")
        if not isinstance(caller, nn.Module):
            continue
        if attention is None and hasattr(caller, "layer_idx"):
            attention = caller
        if isinstance(caller, PreTrainedModel) and attention is not None:
            model = caller if any(module is attention for module in caller.modules()) else model
    return model


def calling_ids(batch: int, columns: int) -> Iterator[tuple[torch.Tensor, object]]:
    """Token ids [batch, columns] held by the models on the stack whose attention module is calling, with the model's config.

    The innermost first: a model's forward, or further up `generate`, which has a prompt as a whole where forwards see chunks
    or drafts along with it.
    """
    attention = None
    for frame in _frames():
        local = frame.f_locals
        caller, ids = local.get("self"), local.get("input_ids")
        if not isinstance(caller, nn.Module):
            continue
        if attention is None and hasattr(caller, "layer_idx"):
            attention = caller
        if not isinstance(caller, PreTrainedModel) or not torch.is_tensor(ids) or ids.shape != (batch, columns):
            continue
        if attention is not None and any(module is attention for module in caller.modules()):
            yield ids, caller.config


def _frames() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
