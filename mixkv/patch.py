"""patch, unpatch, patched: one line makes `generate` keep a compressed cache, one line undoes it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import nn
from transformers import PreTrainedModel

from .cache import MixKVCache
from .config import MixKVConfig, checked_config
from .hf.binding import bind, unbind, unwrap

_HOOK = "_prepare_cache_for_generation"
_CONFIG = "_mixkv_config"


def patch(model: nn.Module, config: MixKVConfig | None = None, **options) -> nn.Module:
    """Makes ``model.generate`` keep a compressed cache whenever the caller passes none.

    Patching again replaces the configuration. Only this instance changes; `unpatch` restores it.

    Args:
        model: a transformers model (inside torch.compile or peft, if you like).
        config, options: a `MixKVConfig`, and fields of it over that.

    Returns: ``model``.

    Raises:
        ValueError: bad options, or a model that cannot be compressed.
    """
    inner = unwrap(model)
    config = checked_config(config, **options)
    bind(inner)
    setattr(inner, _CONFIG, config)
    inner.__dict__[_HOOK] = MethodType(_prepare_cache, inner)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes `patch`, and what binding a cache did: the model is as it was, to the bit. Returns ``model``."""
    inner = unwrap(model)
    inner.__dict__.pop(_HOOK, None)
    inner.__dict__.pop(_CONFIG, None)
    unbind(inner)
    return model


@contextmanager
def patched(model: nn.Module, config: MixKVConfig | None = None, **options) -> Iterator[nn.Module]:
    """`patch` for the length of a with-block; afterwards the model is as it was before, patched otherwise or not."""
    inner = unwrap(model)
    before = inner.__dict__.get(_CONFIG)
    patch(model, config, **options)
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            patch(model, before)


def _prepare_cache(self: PreTrainedModel, generation_config, model_kwargs, *args, **kwargs):
    """In place of the model's own: supplies the compressed cache where `generate` would make a dynamic one."""
    asked_for = generation_config.cache_implementation
    ours = (
        model_kwargs.get("past_key_values") is None
        and generation_config.use_cache is not False
        and not getattr(generation_config, "is_assistant", False)
    )
    if ours and asked_for is not None and "offloaded" in asked_for:
        raise ValueError(
            f"cache_implementation={asked_for!r} and mixkv exclude each other: leave it out, or mixkv.unpatch(model)"
        )
    if ours and asked_for is not None:
        warnings.warn(f"cache_implementation={asked_for!r} was asked for: this generation is not compressed by mixkv")
        ours = False
    if ours:
        model_kwargs["past_key_values"] = MixKVCache(self, getattr(self, _CONFIG))
        return None
    return getattr(type(self), _HOOK)(self, generation_config, model_kwargs, *args, **kwargs)
