"""What is read off the frames of `generate` and of models on the call stack. Nothing else looks at frames."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .versions import NEWEST_TESTED


def prompt_plan(tokens: int, seen: int = 0) -> tuple[int | None, bool]:
    """How the calling `generate` reads its prompt, or a later turn after ``seen`` tokens.

    A cache sees one forward at a time: neither that more chunks of the prompt follow (``prefill_chunk_size``), nor where
    the prompt ends and the drafts of assisted decoding begin. `generate` knows, a few frames up.

    Args:
        tokens: how many the present forward, the first of a prompt or turn, reads.
        seen: tokens read before.

    Returns: the length of the prompt or turn in tokens if it comes in several forwards or with drafts attached, else None; and whether
        tokens may be taken back after each forward (assisted decoding, of which transformers before 5.15 does not inform the cache).

    Raises:
        RuntimeError: it may come so, and the frames of this transformers do not say how long it is.
    """
    frames = _generation_frames()
    if not frames:
        return None, False
    for frame in frames:
        if frame.f_code.co_name == "_assisted_decoding" and seen > 0:
            drafts = frame.f_locals.get("candidate_length")
            if not isinstance(drafts, int) or drafts >= tokens:
                raise _unknown()
            return tokens - drafts, True
        if frame.f_code.co_name == "_assisted_decoding":
            return _prompt_length(frame, 0, lambda length: length <= tokens), True
        if frame.f_code.co_name == "_prefill" and _chunk_size(frame.f_locals.get("generation_config")) is not None:
            return _prompt_length(frame, seen, lambda length: length >= tokens), False
    if seen > 0 and tokens == 1:
        return None, False
    # No frame of the two that read a prompt in parts: the options of `generate` confirm that none was asked for.
    options = next((found for frame in frames if (found := _generation_config(frame)) is not None), None)
    assistant = next((frame.f_locals["assistant_model"] for frame in frames if "assistant_model" in frame.f_locals), None)
    if options is None or _chunk_size(options) is not None or "assisted" in str(options.get_generation_mode(assistant)).lower():
        raise _unknown()
    return None, False


def in_generate() -> bool:
    """Whether `generate` is calling."""
    return bool(_generation_frames())


def _generation_frames() -> list[FrameType]:
    return [frame for frame in _frames() if frame.f_globals.get("__name__", "").startswith("transformers.generation.")]


def _prompt_length(frame: FrameType, seen: int, is_possible: Callable[[int], bool]) -> int | None:
    """The length of the prompt or turn that ``frame`` has as token ids; None if there are none, but embeddings."""
    ids = frame.f_locals.get("input_ids")
    if not torch.is_tensor(ids) or ids.ndim != 2:
        raise _unknown()
    length = ids.shape[1]
    # The ids are of everything read so far, too, unless `generate` was given those of the new tokens alone.
    if length > 0 and seen > 0 and frame.f_locals.get("next_sequence_length") != 0:
        length = frame.f_locals.get("next_sequence_length") or length - seen
    if ids.shape[1] > 0 and not (length > 0 and is_possible(length)):
        raise _unknown()
    return length or None


def _generation_config(frame: FrameType):
    """The options of `generate` among the variables of ``frame``, whatever it calls them."""
    return next((value for value in frame.f_locals.values() if type(value).__name__ == "GenerationConfig"), None)


def _chunk_size(options) -> int | None:
    if not hasattr(options, "prefill_chunk_size"):
        raise _unknown()
    return options.prefill_chunk_size


def _unknown() -> RuntimeError:
    return RuntimeError(
        f"this prompt may come in several forwards or with drafts, and its length is unknown in transformers "
        f"{transformers.__version__}: call cache.expect_prompt(length) with its length in tokens before generate, leave "
        f"prefill_chunk_size and assisted decoding out, or install transformers=={NEWEST_TESTED}"
    )


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
    model, ids = caller.f_locals.get("self"), caller.f_locals.get("input_ids")
    limit = getattr(getattr(model, "config", None), "original_max_position_embeddings", None)
    return limit if limit is not None and ids is not None and length <= limit < ids.shape[1] else None


def assisted_model() -> PreTrainedModel | None:
    """The model whose assisted decoding is calling; None if there is none."""
    for frame in _frames():
        model = frame.f_locals.get("self")
        if frame.f_code.co_name == "_assisted_decoding" and isinstance(model, PreTrainedModel):
            return model
    return None


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


def calling_ids(batch: int, tokens: int) -> Iterator[tuple[torch.Tensor, object]]:
    """Token ids [batch, tokens] held by the models on the stack whose attention module is calling, with the model's config.

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
        if not isinstance(caller, PreTrainedModel) or not torch.is_tensor(ids) or ids.shape != (batch, tokens):
            continue
        if attention is not None and any(module is attention for module in caller.modules()):
            yield ids, caller.config


def _frames() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
