"""What a value row adds to the residual stream: small factors of a model's output projections, made once a model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

_NAMES = ("o_proj", "out_proj", "dense", "wo")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Attention module -> (what the factor was made of, the factor). Goes with the module.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, torch.Tensor]] = weakref.WeakKeyDictionary()
# Attention module -> the norm that its output goes through before it is added to the residual stream.
_norms: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def learn_norms(decoder: nn.Module, attention: Iterable[nn.Module]) -> None:
    """Finds the norms between attention and residual stream (gemma2, gemma3, olmo2, glm4, ...).

    Args:
        decoder: holds the layers.
        attention: its attention modules.
    """
    wanted = set(attention)
    for layer in decoder.modules():
        for child in wanted.intersection(layer.children()):
            norm = getattr(layer, "post_self_attn_layernorm", None)
            if norm is None and hasattr(layer, "post_feedforward_layernorm"):
                norm = getattr(layer, "post_attention_layernorm", None)
            if norm is not None and not isinstance(norm, nn.LayerNorm):
                _norms[child] = norm


def output_factor(module: nn.Module, key_value_heads: int, size: int) -> torch.Tensor | None:
    """The factor whose product with a value row is as long as what the row adds to the layer's output.

    With W_g the D columns of the output projection that belong to query head g, a row v of a KV head adds W_g v for each of
    its G query heads. The factor R is triangular with ``R^T R = mean_g W_g^T W_g``, so |R v| is the root mean square over g of
    |W_g v|, through D x D numbers in place of hidden x G D. The weight of a norm behind the projection is part of W; what the
    norm divides by is `output_scale`.

    Args:
        module: an attention module.
        key_value_heads: Hkv.
        size: Dv, the head size of its values.

    Returns: float32 [Hkv, Dv, Dv], upper triangular, on the projection's device. None where the module has no projection that
        can be read: quantised, offloaded or sharded weights, or names unknown here.
    """
    weight = _projection(module, key_value_heads * size)
    if weight is None:
        return None
    parts = [weight, *(_norms[module].parameters() if module in _norms else ())]
    made_of = (key_value_heads, *((part.data_ptr(), part._version, part.device, part.dtype) for part in parts))
    known = _known.get(module)
    if known is None or known[0] != made_of:
        weight = weight.detach()
        gain = _gain(module, weight)
        weight = weight if gain is None else weight * gain.unsqueeze(-1)
        known = _known[module] = (made_of, factor(weight, key_value_heads, size))
    return known[1]


def output_scale(module: nn.Module, output: torch.Tensor) -> torch.Tensor | None:
    """What a norm behind the output projection multiplies a layer's output by, so that layers can be compared.

    Args:
        module: an attention module.
        output: [B, n, Hq, Dv], attention's output for the last queries, before the projection.

    Returns: float32 [B], the mean over the queries of one by the root mean square of what the norm is given; None where
        there is no such norm, or the projection cannot be read.
    """
    columns = output.shape[2] * output.shape[3]
    weight = _projection(module, columns)
    if module not in _norms or weight is None:
        return None
    added = output.flatten(2).float() @ weight.detach().float().T
    return added.square().mean(dim=-1).sqrt().clamp(min=1e-12).reciprocal().mean(dim=-1)


def _gain(module: nn.Module, weight: torch.Tensor) -> torch.Tensor | None:
    """The factors [hidden] that the norm behind a projection gives each channel: of ones it returns nothing else."""
    norm = _norms.get(module)
    if norm is None:
        return None
    with torch.no_grad():
        return norm(torch.ones(1, weight.shape[0], dtype=weight.dtype, device=weight.device))[0].to(weight.dtype)


def factor(weight: torch.Tensor, key_value_heads: int, size: int) -> torch.Tensor:
    """The factors [Hkv, Dv, Dv] of an output projection's ``weight`` [hidden, Hq * Dv]; see `output_factor`."""
    groups = weight.shape[1] // (key_value_heads * size)
    columns = weight.double().view(weight.shape[0], key_value_heads, groups, size).permute(1, 2, 0, 3)
    gram = (columns.transpose(-1, -2) @ columns).mean(dim=1)
    # A rank lost to few rows or to zeros must not stop the factorisation; the trace is far above what is added.
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp(min=1e-30)
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(gram + 1e-12 * scale[:, None, None] * identity).transpose(-1, -2).float().contiguous()


def _projection(module: nn.Module, columns: int) -> torch.Tensor | None:
    """The weight [hidden, a multiple of ``columns``] of the module's output projection, if it holds plain numbers."""
    for name in _NAMES:
        weight = getattr(getattr(module, name, None), "weight", None)
        plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype in _DTYPES and not weight.is_meta
        if plain and weight.ndim == 2 and weight.shape[1] % columns == 0:
            return weight
    return None
