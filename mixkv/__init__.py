"""mixkv: a compressed KV cache for transformers' `generate`, from one line."""

from . import moved, plot
from .cache import MixKVCache
from .calibrate import calibrate
from .config import MixKVConfig
from .patch import patch, patched, unpatch
from .read import read
from .registry import register_method, register_score
from .selection import Selection, select

moved.install()

__version__ = "0.2.0.dev0"
__all__ = [
    "MixKVCache",
    "MixKVConfig",
    "Selection",
    "calibrate",
    "patch",
    "patched",
    "plot",
    "read",
    "register_method",
    "register_score",
    "select",
    "unpatch",
]


def __getattr__(name: str):
    return moved.module(name)
