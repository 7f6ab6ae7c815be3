"""What a value row adds to the residual stream: small factors of a model's output projections, computed once a model."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable

import torch
from torch import nn

from ..tensor_parallel import HeadShard

_NAMES = ("o_proj", "out_proj", "dense", "wo")
# Devices that have float64; elsewhere factors are made on the host.
_WITH_FLOAT64 = ("cpu", "cuda")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# All by attention module, and gone with it: (what the factor was computed from, the factor),
_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, torch.Tensor]] = weakref.WeakKeyDictionary()
# the norm that its output goes through before it is added to the residual stream,
_norms: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
# and the decoder that it is part of.
_decoders: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
# Decoders, or attention modules by themselves, of which a warning was given.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def learn_norms(decoder: nn.Module, attention: Iterable[nn.Module]) -> None:
    """Finds the norms between attention and residual stream (gemma2, gemma3, olmo2, glm4, ...).

    Args:
        decoder: holds the layers.
        attention: its attention modules.
    """
    wanted = set(attention)
    for module in wanted:
        _decoders[module] = weakref.ref(decoder)
    for layer in decoder.modules():
        for child in wanted.intersection(layer.children()):
            norm = getattr(layer, "post_self_attn_layernorm", None)
            if norm is None and hasattr(layer, "post_feedforward_layernorm"):
                norm = getattr(layer, "post_attention_layernorm", None)
            if norm is not None and not isinstance(norm, nn.LayerNorm):
                _norms[child] = norm


def output_factor(module: nn.Module, key_value_heads: int, size: int, shard: HeadShard | None = None) -> torch.Tensor | None:
    """The factor whose product with a value row is as long as what the row adds to the layer's output.

    With W_g the D columns of the output projection that belong to query head g, a row v of a KV head adds W_g v for each of
    its G query heads. The factor R is triangular with ``R^T R = mean_g W_g^T W_g``, so |R v| is the root mean square over g of
    |W_g v|, through D x D numbers in place of hidden x G D. The weight of a norm behind the projection is part of W; what the
    norm divides by is `output_scale`.

    Args:
        module: an attention module, of ``num_key_value_groups`` query heads per KV head.
        key_value_heads: Hkv.
        size: Dv, the head size of its values.
        shard: which heads these are, where several processes run the module.

    Returns: float32 [Hkv, Dv, Dv], upper triangular, on the projection's device. None, with a warning once a model, where the
        module has no projection that can be read: quantised or offloaded weights, or names unknown here.
    """
    columns = module.num_key_value_groups * key_value_heads * size
    weight = _projection(module, columns, shard)
    if weight is None:
        _warn_unreadable(module)
        return None
    read = [weight, *(_norms[module].parameters() if module in _norms else ())]
    made_of = (key_value_heads, *((tensor.data_ptr(), tensor._version, tensor.device, tensor.dtype) for tensor in read))
    known = _known.get(module)
    if known is None or known[0] != made_of:
        weight = weight if weight.shape[1] == columns else shard.columns(weight)
        gain = _gain(module, weight)
        weight = weight if gain is None else weight * gain.unsqueeze(-1)
        known = _known[module] = (made_of, factor(weight, key_value_heads, size))
    return known[1]


def projected_output(module: nn.Module, output: torch.Tensor, shard: HeadShard | None = None) -> torch.Tensor | None:
    """What a norm behind the output projection is given.

    Args:
        module: an attention module.
        output: [B, n, Hq, Dv], attention's output for the last queries, before the projection.
        shard: which heads these are, where several processes run the module.

    Returns: float32 [B, n, hidden], of which the sum over the processes is meant; None where there is no such norm, or the
        projection cannot be read.
    """
    if module not in _norms:
        return None
    output = output.flatten(2)
    weight = _projection(module, output.shape[2], shard)
    if weight is None:
        return None
    columns = weight.shape[1]
    if columns < output.shape[2]:
        output = output[..., shard.rank * columns : (shard.rank + 1) * columns]
    elif shard is not None and not shard.sharded and shard.rank > 0:
        # Every process has all of it: one counts.
        return output.new_zeros(*output.shape[:2], weight.shape[0], dtype=torch.float32)
    return output.float() @ weight.to(output.device).float().T


def output_scale(projected: torch.Tensor) -> torch.Tensor:
    """What a norm multiplies a layer's output by, so that layers can be compared.

    Args:
        projected: [B, n, hidden], `projected_output` for the last queries.

    Returns: float32 [B], the mean over the queries of one by the root mean square of what the norm is given.
    """
    return projected.square().mean(dim=-1).sqrt().clamp(min=1e-12).reciprocal().mean(dim=-1)


def _warn_unreadable(module: nn.Module) -> None:
    """Says, once a model, that the output projection of ``module`` cannot be read, and what follows from it."""
    decoder = _decoders.get(module, lambda: None)() or module
    if decoder in _warned:
        return
    _warned.add(decoder)
    projection = next((part for name in _NAMES if (part := getattr(module, name, None)) is not None), None)
    weight = getattr(projection, "weight", None)
    kind = (
        f"its output projection is a {type(projection).__name__}" if projection is not None else "no output projection is found"
    )
    kind += f" with {weight.dtype} weights on {weight.device}" if isinstance(weight, torch.Tensor) else ""
    warnings.warn(
        f"what values add to the output of {type(decoder).__name__} cannot be computed in layer {getattr(module, 'layer_idx', '?')} "
        f"({type(module).__name__}): {kind}. There, scores and methods that use it rank tokens by the norm of their values instead, and "
        f"keep others than in a model of unquantised weights; stats()['output_norm'] has it by layer"
    )


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
    device = weight.device
    weight = weight if device.type in _WITH_FLOAT64 else weight.cpu()
    columns = weight.double().view(weight.shape[0], key_value_heads, groups, size).permute(1, 2, 0, 3)
    gram = (columns.transpose(-1, -2) @ columns).mean(dim=1)
    # A rank lost to few rows or to zeros must not stop the factorisation; the trace is far above what is added.
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp(min=1e-30)
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    root = torch.linalg.cholesky(gram + 1e-12 * scale[:, None, None] * identity)
    return root.transpose(-1, -2).float().contiguous().to(device)


def _projection(module: nn.Module, columns: int, shard: HeadShard | None) -> torch.Tensor | None:
    """The weight [hidden, columns] of the module's output projection, if it holds plain numbers.

    Where all heads are in every process, it may be this process's equal share of the columns.
    """
    spread = shard is not None and shard.processes > 1
    widths = (columns, columns / shard.processes) if spread and not shard.sharded else (columns,)
    for name in _NAMES:
        weight = getattr(getattr(module, name, None), "weight", None)
        if spread and hasattr(weight, "to_local"):
            weight = weight.detach().to_local()
        plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype in _DTYPES and not weight.is_meta
        if plain and weight.ndim == 2 and weight.shape[1] in widths:
            return weight.detach()
    return None
