"""Binding: a model's decoder attention is pointed at the cache-aware attention function, and back. All of it reversible."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import tensor_parallel
from . import output_projection, versions
from .attention import attend_with_cache

_PREFIX = "mixkv_"
_LOCK = threading.Lock()


def bind(model: PreTrainedModel) -> list[CacheLayerMixin | None]:
    """Makes the attention of ``model``'s decoder look for compressed caches. Doing it again changes nothing.

    Returns: one entry a decoder layer: None where this library's layer belongs, else the stock layer to use.

    Raises:
        ValueError: a model that cannot be compressed; the message says why.
    """
    slots = _slots(model)
    modules = attention_modules(model)
    missing = [index for index, slot in enumerate(slots) if slot is None and index not in modules]
    if missing:
        raise ValueError(
            f"{_name(model)} has no attention module with key/value heads for layers {missing}: it is not supported"
        )
    output_projection.learn_norms(model.get_decoder() or model, modules.values())
    tensor_parallel.learn(versions.tensor_parallel_mesh(model), modules.values())
    with _LOCK:
        for config in _configs(modules):
            base = config._attn_implementation or "eager"
            if not base.startswith(_PREFIX):
                config._attn_implementation_internal = _register(model, base)
    return slots


def unbind(model: PreTrainedModel) -> None:
    """Undoes `bind`: the attention implementation is what it was."""
    with _LOCK:
        for config in _configs(attention_modules(model)):
            name = config._attn_implementation
            if name is not None and name.startswith(_PREFIX):
                config._attn_implementation_internal = name.removeprefix(_PREFIX)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside torch.compile's and peft's wrappers.

    Raises:
        ValueError: there is none.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"model must be a transformers PreTrainedModel, not {type(model).__name__}")
    return inner


def _slots(model: PreTrainedModel) -> list[CacheLayerMixin | None]:
    """The model's cache layers, None for those to compress."""
    if model.config.is_encoder_decoder:
        raise ValueError(f"{_name(model)} is an encoder-decoder model: only decoders with self-attention caches are supported")
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(f"{_name(model)} caches a latent instead of keys (multi-head latent attention): not supported")
    if getattr(text, "num_kv_shared_layers", None):
        raise ValueError(f"{_name(model)} shares keys and values between layers: not supported")
    cross = getattr(text, "cross_attention_layers", None) or ()
    slots: list[CacheLayerMixin | None] = []
    for index, layer in enumerate(versions.stock_layers(text)):
        if versions.is_full_attention(layer) and index not in cross:
            slots.append(None)
        elif versions.is_bounded(layer) or index in cross:
            slots.append(layer)
        else:
            raise ValueError(f"layer {index} of {_name(model)} needs a {type(layer).__name__}, which cannot be compressed")
    if None not in slots:
        raise ValueError(
            f"{_name(model)} has no full-attention layer (sliding_window={getattr(text, 'sliding_window', None)}): its cache is "
            f"bounded already and there is nothing to compress. Build it with sliding_window=None to attend to everything"
        )
    return slots


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Layer index -> self-attention module of the decoder, in those that go through the attention interface."""
    decoder = model.get_decoder()
    decoder = model if decoder is None else decoder
    if not getattr(decoder, "_supports_attention_backend", False):
        raise ValueError(f"{_name(model)} does not use transformers' attention interface: it is not supported")
    return {
        module.layer_idx: module
        for module in decoder.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "num_key_value_groups")
    }


def _configs(modules: dict[int, nn.Module]) -> list:
    return list({id(module.config): module.config for module in modules.values()}.values())


def _register(model: PreTrainedModel, base: str) -> str:
    """The name under which the cache-aware variant of attention ``base`` is known to transformers."""
    if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS or base not in ALL_MASK_ATTENTION_FUNCTIONS or "flex" in base:
        raise ValueError(
            f"{_name(model)} uses attn_implementation={base!r}, which is not supported: call "
            f"model.set_attn_implementation('sdpa') (or 'eager', 'flash_attention_2') first"
        )
    name = _PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, partial(attend_with_cache, _base_attention(base)))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _base_attention(base: str) -> Callable:
    if base == "eager":
        return _eager
    if "flash" in base:
        return partial(_flash, base)
    return ALL_ATTENTION_FUNCTIONS[base]


def _eager(module: nn.Module, *args, **kwargs):
    """Eager attention is no registry entry: every model file has its own."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function(module, *args, **kwargs)
    raise RuntimeError(f"{type(module).__name__} has no eager attention: call model.set_attn_implementation('sdpa')")


def _flash(base: str, module: nn.Module, *args, **kwargs):
    """Flash attention asks ``module.config`` for the kernel's name; a stand-in gives it the base's."""
    config = _Overlay(module.config, _attn_implementation=base, _attn_implementation_internal=base)
    return ALL_ATTENTION_FUNCTIONS[base](_Overlay(module, config=config), *args, **kwargs)


class _Overlay(SimpleNamespace):
    """An object seen through a few attributes of its own."""

    def __init__(self, target, **own):
        super().__init__(_target=target, **own)

    def __getattr__(self, name: str):
        return getattr(self._target, name)


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__
