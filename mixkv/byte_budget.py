"""Budgets that are text: in bytes, or ``AUTO``."""

from __future__ import annotations

import re

# As many entries as have a score above ``MixKVConfig.threshold``.
AUTO = "auto"

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?(B|KiB|MiB|GiB)")
_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")


def parse_bytes(text: str) -> tuple[float | None, float | None]:
    """A budget in bytes, as ``(bytes, None)`` from such as "64MiB", or ``(None, share)`` of the full cache's from such as "10%".

    Raises:
        ValueError: it is neither.
    """
    size, share = _BYTES.fullmatch(text), _SHARE.fullmatch(text)
    if size and float(size[1]) > 0:
        return float(size[1]) * _UNITS[size[2]], None
    if share and 0 < float(share[1]) <= 100:
        return None, float(share[1]) / 100
    raise ValueError(
        f"budget={text!r} is no number of bytes: give such as '64MiB' (B, KiB, MiB, GiB), or '10%' of the full cache's bytes; or 'auto'"
    )
