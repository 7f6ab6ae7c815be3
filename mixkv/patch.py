"""patch, unpatch, patched: one line makes `generate` keep a compressed cache, one line undoes it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from torch import nn
from transformers import PreTrainedModel

from .cache import MixKVCache, workspace
from .config import MixKVConfig, checked_config
from .hf import binding, versions
from .hf.weak_method import WeakMethod

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
    inner = binding.unwrap(model)
    config = checked_config(config, **options)
    if not hasattr(type(inner), _HOOK):
        raise ValueError(
            f"transformers {transformers.__version__} has no {_HOOK}, through which patch hands in the cache: install "
            f"transformers=={versions.NEWEST_TESTED}, or pass generate a MixKVCache(model)"
        )
    hook = WeakMethod(_prepare_cache, inner)
    binding.bind(inner, hook)
    setattr(inner, _CONFIG, config)
    inner.__dict__[_HOOK] = hook
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes `patch`, and what binding a cache did: the model is as it was, to the bit. Returns ``model``.

    Another model that shares its config object, and is patched or has a compressed cache, stays as it is.
    """
    inner = binding.unwrap(model)
    _remove_hook(inner)
    binding.unbind(inner)
    workspace.forget(inner)
    return model


@contextmanager
def patched(model: nn.Module, config: MixKVConfig | None = None, **options) -> Iterator[nn.Module]:
    """`patch` for the length of a with-block; afterwards the model is as it was before, patched otherwise or not.

    Caches that still exist then, made before or within the block, stay usable.
    """
    inner = binding.unwrap(model)
    before, was_bound = inner.__dict__.get(_CONFIG), binding.is_bound(inner)
    patch(model, config, **options)
    try:
        yield model
    finally:
        if before is not None:
            patch(model, before)
        else:
            _remove_hook(inner)
            if not was_bound:
                binding.unbind_if_unused(inner)


def _remove_hook(inner: PreTrainedModel) -> None:
    inner.__dict__.pop(_HOOK, None)
    inner.__dict__.pop(_CONFIG, None)


def _prepare_cache(self: PreTrainedModel, generation_config, model_kwargs, *args, **kwargs):
    """In place of the model's own: supplies the compressed cache where `generate` would make a dynamic one."""
    asked_for = generation_config.cache_implementation
    ours = (
        model_kwargs.get(versions.CACHE_ARGUMENT) is None
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
        model_kwargs[versions.CACHE_ARGUMENT] = MixKVCache(self, getattr(self, _CONFIG))
        return None
    return getattr(type(self), _HOOK)(self, generation_config, model_kwargs, *args, **kwargs)
