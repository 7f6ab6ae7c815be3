"""What differs between transformers versions, and what is read off its internals. Nothing else."""

from __future__ import annotations

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers import cache_utils as transformers_cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


def stock_layers(text_config) -> list[CacheLayerMixin]:
    """The cache layers that transformers itself would use for this decoder, one a model layer."""
    return DynamicCache(config=text_config).layers


def is_full_attention(layer) -> bool:
    """A layer whose cache grows with every token: what this library replaces."""
    return type(layer) is DynamicLayer


def is_bounded(layer) -> bool:
    """A layer whose memory does not grow with the sequence: sliding-window attention or a linear-attention state."""
    linear = getattr(transformers_cache, "LinearAttentionCacheLayerMixin", ())
    return isinstance(layer, DynamicSlidingWindowLayer) or (isinstance(layer, linear) and not isinstance(layer, DynamicLayer))


def holds_view(layer) -> bool:
    """A sliding-window layer that keeps a whole prompt in memory through a view of its last columns."""
    if not isinstance(layer, DynamicSlidingWindowLayer) or layer.keys is None:
        return False
    return layer.keys.untyped_storage().nbytes() > 2 * layer.keys.nbytes


def position_keepers(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that remember on themselves, as ``rope_deltas`` [B, 1] or None, how far an image moved the positions after it."""
    return [module for module in model.modules() if hasattr(module, "rope_deltas")]


def tensor_parallel_mesh(model: nn.Module):
    """The one-dimensional device mesh over which ``model``'s attention heads are shared out (``tp_plan``); None: one process."""
    # Older versions have a mesh of this dimension alone, without a name.
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    mesh = model._device_mesh
    return mesh["tp"] if mesh.ndim > 1 else mesh
