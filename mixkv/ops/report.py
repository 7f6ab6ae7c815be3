"""What runs on this machine, for ``mixkv info`` and ``mixkv build``."""

from __future__ import annotations

import os

import torch

from . import checked, dispatch, native

# What a GPU is checked for beforehand.
_USUAL = checked.Place(torch.device("cuda"), torch.bfloat16, 128, 128)


def report() -> list[str]:
    """What runs on this machine, a line each, for ``mixkv info``: the choice for float32 on the CPU and bfloat16 on the GPU."""
    place = (torch.device("cpu"), torch.float32, 128, 128)
    chosen = dispatch.choose("auto", *place)
    lines = [f"cpu: back end {chosen}" + (f" ({native.describe('cpu')})" if chosen == "native" else "")]
    if chosen != "native":
        lines.append(f"cpu: not native: {dispatch.why_not('native', *place)}")
    if not torch.cuda.is_available():
        return lines
    asked = os.environ.get("MIXKV_BACKEND", "auto")
    if asked != "auto":
        return [*lines, f"cuda: back end {asked} (MIXKV_BACKEND)"]
    return lines + checked.report(_USUAL)


def check_gpu() -> list[str]:
    """Checks the back ends of a GPU for bfloat16 and head size 128 beforehand, where there is one; the outcome, a line each."""
    if not torch.cuda.is_available():
        return []
    checked.outcomes(_USUAL)
    return checked.report(_USUAL)
