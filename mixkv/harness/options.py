"""Splits ``model_args`` of a harness into a `MixKVConfig` and the arguments of the harness."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import MixKVConfig
from ..registry import BACKENDS

# lm_eval has a ``backend`` of its own.
RENAMED = {"kv_backend": "backend"}
_WORDS = {"none": None, "true": True, "false": False}


def split(given: dict[str, Any]) -> tuple[MixKVConfig, dict[str, Any]]:
    """Takes the fields of `MixKVConfig` out of ``given``; its ``backend`` is named ``kv_backend``.

    Numbers, ``none``, ``true`` and ``false`` may be text; a number without a point is an int.

    Returns: the config, and the other arguments unchanged.

    Raises:
        ValueError: the value of a field is invalid; the message names it.
    """
    if given.get("backend") in BACKENDS:
        raise ValueError(
            f"backend={given['backend']!r} is an option of the harness; for the back end of mixkv's storage, use "
            f"kv_backend={given['backend']}"
        )
    fields = {field.name: field.name for field in dataclasses.fields(MixKVConfig) if field.name != "backend"} | RENAMED
    ours = {fields[name]: _typed(value) for name, value in given.items() if name in fields}
    return MixKVConfig().replace(**ours), {name: value for name, value in given.items() if name not in fields}


def _typed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
