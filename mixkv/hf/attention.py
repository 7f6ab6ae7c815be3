"""The attention function that meets the cache: prefill, decode, continuation.

`MixKVLayer.update` marks the key it returns with itself; a registered attention function finds the mark. A key without one
goes to the base attention unchanged, so other caches and other models are not affected.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from ..ops.arguments import LogitOptions
from .versions import CACHE_ARGUMENT

MARK = "mixkv_layer"
# A forward that has no such argument hands it down to here, among those it does not know.
_CACHE_IS_IGNORED = CACHE_ARGUMENT != "cache"


def attend_with_cache(
    base: Callable,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function in the sense of transformers' ``AttentionInterface``.

    Args:
        base: the attention function that this one stands before.
        query: [B, Hq, n, D]; key, value: [B, Hkv, n, D], with all tokens read so far while a prompt is being read.
        attention_mask: 4-D bool or additive, 2-D (flash attention), or None.

    Returns: the output [B, n, Hq, Dv], and attention weights where the base gives them (prefill only).

    Raises:
        TypeError: ``forward`` was given a cache under a name that this transformers does not know.
    """
    # The mark is looked for outside what torch.compile leaves out: with other caches a bound model compiles to one graph.
    if (layer := getattr(key, MARK, None)) is not None:
        if layer.is_step:
            return layer.step(query, key, value, _logit_options(query, kwargs)), None
        return _attend(layer, base, module, query, key, value, attention_mask, kwargs)
    if _CACHE_IS_IGNORED and kwargs.get("cache") is not None:
        raise TypeError("this transformers calls the cache past_key_values: pass past_key_values=cache to the model's forward")
    return base(module, query, key, value, attention_mask, **kwargs)


@torch.compiler.disable
def _attend(layer, base, module, query, key, value, mask, kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    if layer.replaying:
        return layer.replay(query, key, value, _logit_options(query, kwargs)), None
    with layer.attention_call(module, kwargs):
        # A prompt's own attention is the base's, on full keys and values; stored rows are cut off from what made them.
        if layer.rows is not None or layer.prompt_length not in (None, key.shape[2]):
            _refuse_gradients(query, key, value)
        if layer.rows is None:
            return _read_prompt(layer, base, module, query, key, value, mask, kwargs)
        if kwargs.get("output_attentions"):
            warnings.warn(
                "attention weights exist for the prompt only: rows of a compressed cache have no full rows of weights"
            )
        return _continue(layer, query, key, value, mask, _logit_options(query, kwargs)), None


def _read_prompt(layer, base, module, query, key, value, mask, kwargs):
    """Base attention over all tokens read so far; then, with the prompt complete, only the selected rows are kept."""
    total, new = key.shape[2], query.shape[2]
    prompt = layer.prompt_length or total
    if total < prompt:
        output = base(module, query, key, value, mask, **kwargs)
        layer.append_prefill_chunk(query, key, value)
        return output
    # Of the new tokens, those that belong to the prompt; the rest are drafts.
    own = new - (total - prompt)
    prompt_mask = mask if total == prompt else _slice_mask(mask, slice(own), slice(prompt))
    output, weights = base(module, query[:, :, :own], key[:, :, :prompt], value[:, :, :prompt], prompt_mask, **kwargs)
    logits = _logit_options(query, kwargs)
    valid = layer.state.valid_tokens(prompt_mask, 0, prompt)
    with torch.no_grad():
        layer.compress(query[:, :, :own], key[:, :, :prompt], value[:, :, :prompt], output, valid, logits)
    if total == prompt:
        return output, weights
    # Draft tokens came along with the prompt: they see the compressed cache, as they would in a forward of their own.
    draft_mask = _slice_mask(mask, slice(own, None), slice(prompt, None))
    draft = _continue(layer, query[:, :, own:], key[:, :, prompt:], value[:, :, prompt:], draft_mask, logits)
    return torch.cat([output, draft], dim=1), None


def _continue(layer, query, key, value, mask, logits) -> torch.Tensor:
    """Attention of new positions over the stored rows and each other; the new rows are stored."""
    new, drafts = query.shape[2], layer.drafts
    if 0 < drafts < new:
        # They see what is left of their turn, as they would in a forward of their own.
        outputs = [
            _read_block(layer, query[:, :, own], key[:, :, own], value[:, :, own], _slice_mask(mask, own, own), logits, end)
            for own, end in ((slice(-drafts), layer.seen - drafts), (slice(-drafts, None), layer.seen))
        ]
        return torch.cat(outputs, dim=1)
    return _read_block(layer, query, key, value, mask, logits, layer.seen)


def _read_block(layer, query, key, value, mask, logits, end) -> torch.Tensor:
    """`_continue` for tokens that see the same stored rows; ``end``: the position after the last."""
    new = query.shape[2]
    # A decode step's one token is real in every batch row, as padding on the right is refused: nothing waits for the device.
    valid = None if new == 1 else layer.state.valid_tokens(mask, end - new, new)
    if new == 1:
        output = layer.decode(query, key, value, end - 1, logits)
    else:
        output = layer.extend(query, key, value, end - new, _block_mask(mask, valid, new), valid, logits)
    layer.enforce_budgets(query, output, valid, end)
    return output


def _refuse_gradients(*tensors: torch.Tensor) -> None:
    """Raises a RuntimeError if a backward pass could come through ``tensors``, which would miss what reaches stored rows."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "gradients through a compressed cache would be wrong: its rows are detached from the forward that made them. Go on "
            "under torch.no_grad() or with model.generate, or read the whole sequence in one forward with an empty cache, whose "
            "gradients are exact"
        )


def _logit_options(query: torch.Tensor, kwargs: dict) -> LogitOptions:
    return LogitOptions.of(query.shape[-1], kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux"))


def check_caller(known: torch.nn.Module | None, module: torch.nn.Module, seen: int, kwargs: dict) -> None:
    """Checks that a cache layer that has seen so many tokens, those of the attention module ``known``, may serve ``module``.

    Raises:
        ValueError: it was filled by another module.
        RuntimeError: the module attends in a way that a compressed cache cannot follow; the message has the remedy.
    """
    if module.training and torch.is_grad_enabled():
        raise RuntimeError("the model is in training mode with gradients on: call model.eval(), or use torch.no_grad()")
    if known not in (None, module):
        raise ValueError(f"this cache was filled by another {type(known).__name__}: make a new MixKVCache for this model")
    sliding = kwargs.get("sliding_window")
    if sliding is not None and sliding < seen:
        raise RuntimeError(
            f"layer {getattr(module, 'layer_idx', '?')} attends within sliding_window={sliding}, but its config calls it a full "
            f"attention layer, which is what mixkv compresses: correct config.layer_types"
        )
    if kwargs.get("position_bias") is not None:
        raise RuntimeError("attention with a position bias is not supported: unpatch this model")


def visible(mask: torch.Tensor) -> torch.Tensor:
    """A bool or additive mask as bool, True where a query sees a key."""
    return mask if mask.dtype == torch.bool else mask == 0


def _slice_mask(mask: torch.Tensor | None, queries: slice, keys: slice) -> torch.Tensor | None:
    if mask is None:
        return None
    return mask[:, keys] if mask.ndim == 2 else mask[..., queries, keys]


def _block_mask(mask: torch.Tensor | None, valid: torch.Tensor | None, new: int) -> torch.Tensor | None:
    """Bool [B, 1, n, n] for the new block; None: causal."""
    if mask is not None and mask.ndim == 4:
        return visible(mask[..., -new:])
    if valid is None:
        return None
    causal = torch.ones(new, new, dtype=torch.bool, device=valid.device).tril()
    return causal & valid[:, None, None, :]
