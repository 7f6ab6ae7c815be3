"""Options that every method needs to run on a tiny model."""

import torch

import mixkv
from mixkv import registry
from mixkv.selection.context import Measured
from mixkv.selection.gate import LayerGate


def options_for(method, layers, heads=4):
    """Options of `MixKVConfig` for that method, beside its budget, on a model of so many compressed layers, or on that model.

    ``heads``: query heads, or KV heads.
    """
    if not registry.method(method).needs_profile:
        return dict(method=method)
    if not isinstance(layers, int):
        layers = len([layer for layer in mixkv.MixKVCache(layers).layers if hasattr(layer, "store")])
    profile = torch.rand(layers, heads, generator=torch.Generator().manual_seed(1))
    return dict(method=method, profile=profile)


def measured_for(score, key):
    """What a score needs of a prompt with keys [B, Hkv, N, D] besides its queries, keys and values."""
    generator = torch.Generator().manual_seed(3)
    replay = torch.rand(key.shape[:3], generator=generator) if registry.score(score).needs_replay else None
    gate = None
    if registry.score(score).needs_gate:
        pairs = key.shape[3] // 2
        partner = torch.arange(key.shape[3]).roll(pairs)
        # For values of the keys' size.
        gate = LayerGate(0.2 * torch.randn(key.shape[1], pairs + key.shape[3] + 3, generator=generator) - 0.5, partner)
    return Measured(replay, gate=gate)
