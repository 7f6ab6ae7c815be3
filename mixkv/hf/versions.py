"""What differs between transformers versions. Nothing else asks for a version."""

from __future__ import annotations

import functools
import inspect
import warnings

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel, masking_utils

NEWEST_TESTED = "5.24.0"
"""The newest transformers release that the tests run with; a newer one warns once and runs."""

# Asked of a function that is imported anyway: the module of `generate` brings dozens of others.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(masking_utils.create_causal_mask).parameters else "past_key_values"
"""The name by which ``generate`` and ``forward`` take a cache: ``cache`` since transformers 5.24, ``past_key_values`` before.

From 5.24 on transformers takes the old name, too, with a deprecation warning.
"""


def cache_argument(cache) -> dict:
    """``cache`` as a keyword argument of ``model(...)`` and ``model.generate(...)``, under this version's name."""
    return {CACHE_ARGUMENT: cache}


def returned_cache(output):
    """The cache in what ``model(...)`` or ``model.generate(..., return_dict_in_generate=True)`` returned."""
    return getattr(output, CACHE_ARGUMENT)


@functools.cache
def warn_if_untested() -> None:
    """Warns, once a process, if transformers is of a newer release than `NEWEST_TESTED`."""
    if Version(transformers.__version__).release[:2] > Version(NEWEST_TESTED).release[:2]:
        warnings.warn(
            f"mixkv was tested with transformers up to {NEWEST_TESTED}, and this is {transformers.__version__}: compare a few "
            f"answers, or install transformers=={NEWEST_TESTED}"
        )


def tensor_parallel_mesh(model: nn.Module):
    """The one-dimensional device mesh over which ``model``'s attention heads are shared out (``tp_plan``); None: one process."""
    # Older versions have a mesh of this dimension alone, without a name.
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    mesh = model._device_mesh
    return mesh["tp"] if mesh.ndim > 1 else mesh


def position_keepers(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that remember on themselves, as ``rope_deltas`` [B, 1] or None, how far an image moved the positions after it."""
    return [module for module in model.modules() if hasattr(module, "rope_deltas")]


def last_logits_only(model: PreTrainedModel, count: int = 1) -> dict[str, int]:
    """The option of the forward that computes logits of the last ``count`` positions only, if the model has it."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
