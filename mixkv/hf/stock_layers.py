"""transformers' own cache layers: which a model uses, which of them a compressed cache replaces, and what they hold."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers import cache_utils as transformers_cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

# By name: transformers versions do not all have all of them.
_KNOWN = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)

Numbers = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def of_decoder(text_config) -> list[CacheLayerMixin]:
    """The cache layers that transformers itself would use for this decoder, one a model layer."""
    return DynamicCache(config=text_config).layers


def is_full_attention(layer: CacheLayerMixin) -> bool:
    """A layer whose cache grows with every token: what this library replaces."""
    return type(layer) is DynamicLayer


def is_bounded(layer: CacheLayerMixin) -> bool:
    """A layer whose memory does not grow with the sequence: sliding-window attention or a linear-attention state."""
    linear = getattr(transformers_cache, "LinearAttentionCacheLayerMixin", ())
    return isinstance(layer, DynamicSlidingWindowLayer) or (isinstance(layer, linear) and not isinstance(layer, DynamicLayer))


def keeps_prompt_alive(layer: CacheLayerMixin) -> bool:
    """A sliding-window layer whose tensors are views of a whole prompt, which they keep in memory."""
    if not isinstance(layer, DynamicSlidingWindowLayer) or layer.keys is None:
        return False
    return layer.keys.untyped_storage().nbytes() > 2 * layer.keys.nbytes


def state(layer: CacheLayerMixin) -> tuple[Tensors, Numbers]:
    """The tensors (not copied) and JSON values from which `restore` makes an equal layer.

    Raises:
        ValueError: a kind of layer that is not known here.
    """
    kind = type(layer).__name__
    if kind not in _KNOWN or type(layer) is not getattr(transformers_cache, kind, None):
        raise ValueError(f"a {kind} cannot be saved; known are {', '.join(_KNOWN)}. Use copy.deepcopy to keep it in memory")
    tensors: Tensors = {}
    numbers: Numbers = {"kind": kind}
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        tensors |= {"keys": layer.keys, "values": layer.values}
    if isinstance(layer, DynamicSlidingWindowLayer):
        numbers |= {"sliding_window": layer.sliding_window, "cumulative_length": layer.cumulative_length}
    if _is_linear(layer):
        for name, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
            tensors |= {f"{name}.{index}": tensor for index, tensor in states.items() if tensor is not None}
        numbers["has_previous_state"] = list(layer.has_previous_state.values())
        numbers["conv_kernel_size"] = list(layer.conv_kernel_size.values())
    return tensors, numbers


def restore(layer: CacheLayerMixin, tensors: Tensors, numbers: Numbers, device: torch.device) -> None:
    """Makes the unused ``layer`` equal to the one that `state` read; tensors are copied to ``device``."""
    copies = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
    if "keys" in copies:
        layer.lazy_initialization(copies["keys"], copies["values"])
        layer.keys, layer.values = copies["keys"], copies["values"]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = numbers["cumulative_length"]
    if _is_linear(layer):
        for index, (seen, width) in enumerate(zip(numbers["has_previous_state"], numbers["conv_kernel_size"])):
            if f"conv.{index}" in copies:
                held = copies[f"conv.{index}"]
                layer.lazy_initialization(conv_states=held, state_idx=index)
                layer.conv_states[index], layer.conv_kernel_size[index] = held, width
            if f"recurrent.{index}" in copies:
                held = copies[f"recurrent.{index}"]
                layer.lazy_initialization(recurrent_states=held, state_idx=index)
                layer.recurrent_states[index].copy_(held)
            layer.has_previous_state[index] = seen


def _is_linear(layer: CacheLayerMixin) -> bool:
    return isinstance(layer, getattr(transformers_cache, "LinearAttentionLayer", ()))
