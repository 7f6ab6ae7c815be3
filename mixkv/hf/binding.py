"""Binding: a model's decoder attention is pointed at the cache-aware attention function, and back. All of it reversible."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import tensor_parallel
from . import generation, output_projection, stock_layers, versions
from .attention import attend_with_cache

_PREFIX = "mixkv_"
_LOCK = threading.Lock()


class _BoundName(str):
    """The name of a cache-aware attention function, in the config of a bound model.

    It is pickled as the name of the attention that it stands for, so that a bound model can be used where this library is
    not imported.
    """

    def __reduce__(self):
        return str, (self.removeprefix(_PREFIX),)

    def __deepcopy__(self, memo):
        return self


class ModelReference(weakref.ref):
    """A weak reference to a model that a copied cache keeps, and a pickled one gives up."""

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return type(None), ()


# One object a name: compiled code may compare them by identity.
_names: dict[str, _BoundName] = {}
# Who relies on a model being bound: its caches, and the hook of `patch`. Guarded by _LOCK, like the configs.
_holders: WeakKeyDictionary[PreTrainedModel, WeakSet] = WeakKeyDictionary()


def bind(model: PreTrainedModel, holder: object | None = None) -> list[CacheLayerMixin | None]:
    """Makes the attention of ``model``'s decoder look for compressed caches. Doing it again only adds a holder.

    Args:
        model: a transformers model.
        holder: what relies on the binding: as long as it exists, only `unbind` of this model undoes it. None: nothing does.

    Returns: one entry a decoder layer: None where this library's layer belongs, else the stock layer to use.

    Raises:
        ValueError: a model that cannot be compressed; the message says why.
    """
    versions.warn_if_untested()
    found = slots(model)
    modules = attention_modules(model)
    missing = [index for index, slot in enumerate(found) if slot is None and index not in modules]
    if missing:
        raise ValueError(
            f"{_name(model)} has no attention module with key/value heads for layers {missing}: it is not supported"
        )
    output_projection.learn_norms(model.get_decoder() or model, modules.values())
    tensor_parallel.learn(versions.tensor_parallel_mesh(model), modules.values())
    with _LOCK:
        for config in _configs(modules):
            # A model pickled by an earlier version may name a function that this process does not know yet.
            base = (config._attn_implementation or "eager").removeprefix(_PREFIX)
            name = _register(model, base)
            if config._attn_implementation is not name:
                config._attn_implementation_internal = name
        generation.override(model)
        if holder is not None:
            _holders.setdefault(model, WeakSet()).add(holder)
    return found


def add_holder(model: PreTrainedModel, holder: object) -> None:
    """Says that ``holder``, too, relies on ``model`` being bound, if it is."""
    with _LOCK:
        if model in _holders:
            _holders[model].add(holder)


def is_bound(model: PreTrainedModel) -> bool:
    """Whether `bind` has been called for ``model``, or for a model that has its config, and not been undone."""
    return any(_is_bound(config) for config in _configs(attention_modules(model)))


def unbind(model: PreTrainedModel) -> None:
    """Undoes `bind`: the attention implementation is what it was, unless it is shared with a model that is in use."""
    with _LOCK:
        _holders.pop(model, None)
        _restore_unused(model)


def unbind_if_unused(model: PreTrainedModel) -> None:
    """`unbind`, if no cache exists that relies on the binding."""
    with _LOCK:
        _restore_unused(model)


def _restore_unused(model: PreTrainedModel) -> None:
    in_use = [other for other, holders in list(_holders.items()) if len(holders)]
    kept = {id(config) for other in in_use for config in _configs(attention_modules(other))}
    for config in _configs(attention_modules(model)):
        if _is_bound(config) and id(config) not in kept:
            config._attn_implementation_internal = config._attn_implementation.removeprefix(_PREFIX)
    if not any(other is model for other in in_use):
        generation.restore(model)


def _is_bound(config) -> bool:
    return (config._attn_implementation or "").startswith(_PREFIX)


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


def slots(model: PreTrainedModel) -> list[CacheLayerMixin | None]:
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
    for index, layer in enumerate(stock_layers.of_decoder(text)):
        if stock_layers.is_full_attention(layer) and index not in cross:
            slots.append(None)
        elif stock_layers.is_bounded(layer) or index in cross:
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


def _register(model: PreTrainedModel, base: str) -> _BoundName:
    """The name under which the cache-aware variant of attention ``base`` is known to transformers."""
    if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS or base not in ALL_MASK_ATTENTION_FUNCTIONS or "flex" in base:
        raise ValueError(
            f"{_name(model)} uses attn_implementation={base!r}, which is not supported: call "
            f"model.set_attn_implementation('sdpa') (or 'eager', 'flash_attention_2') first"
        )
    if base not in _names:
        name = _BoundName(_PREFIX + base)
        ALL_ATTENTION_FUNCTIONS.register(name, partial(attend_with_cache, _base_attention(base)))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
        _names[base] = name
    return _names[base]


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
