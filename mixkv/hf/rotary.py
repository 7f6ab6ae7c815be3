"""Which elements of a key a model's rotary embedding turns together."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_FUNCTIONS = ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb", "apply_rotary_emb")


def partners(module: nn.Module, size: int) -> torch.Tensor:
    """The element that each of a key's elements is rotated with, its own index where it is not rotated: int64 [size].

    The function in the model's file that rotates keys is asked to turn every unit vector by a right angle.

    Args:
        module: an attention module.
        size: D.

    Raises:
        ValueError: keys are rotated by a function of an unknown kind.
    """
    alone = torch.arange(size)
    rotate = _function(module)
    if rotate is None:
        return alone
    # Some models hand over a key's first elements, others have the function find out which they are.
    given = getattr(module, "rotary_ndims", size)
    parameters = getattr(module.config, "rope_parameters", None) or getattr(module.config, "rope_scaling", None) or {}
    share = parameters.get("partial_rotary_factor") or getattr(module.config, "partial_rotary_factor", None) or 1.0
    angles = int(given * share) if given == size else given
    basis = torch.eye(given).view(1, 1, given, given)
    for shape in ((1, given, angles), (1, given, angles // 2), (3, 1, given, angles)):
        turned = _quarter_turn(rotate, basis, shape, parameters.get("mrope_section"))
        if turned is None:
            continue
        found = alone.clone()
        found[:given] = turned.abs().argmax(dim=-1)
        if torch.equal(found[found], alone) and torch.allclose(turned.abs().amax(dim=-1), turned.abs().sum(dim=-1)):
            return found
    raise ValueError(
        f"score='gate' does not know how {type(module).__name__} rotates keys: use another score, such as 'mix-output' or 'replay'"
    )


def _function(module: nn.Module) -> Callable | None:
    """The function that rotates keys in the file of a module's class; None: there is none."""
    for kind in type(module).__mro__:
        for name in _FUNCTIONS:
            function = getattr(sys.modules[kind.__module__], name, None)
            if function is not None:
                return function
    return None


def _quarter_turn(rotate: Callable, basis: torch.Tensor, shape: tuple[int, ...], section: Any) -> torch.Tensor | None:
    """Keys ``basis`` [1, 1, n, n] turned by cosines 0 and sines 1 of that shape, [n, n]; None: these do not fit."""
    vectors = dict.fromkeys(("q", "k", "x", "tensor", "xq", "xk"), basis)
    given = vectors | {"cos": torch.zeros(shape), "sin": torch.ones(shape), "mrope_section": section}
    arguments = {name: given[name] for name in inspect.signature(rotate).parameters if name in given}
    try:
        turned = rotate(**arguments)
    except (RuntimeError, TypeError, IndexError):
        # It takes angles of another shape, or of another kind.
        return None
    turned = turned[1] if isinstance(turned, tuple) else turned
    return turned[0, 0] if turned.shape == basis.shape else None
