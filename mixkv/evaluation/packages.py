"""The optional packages that commands need, and how to install them."""

from __future__ import annotations

import importlib.util

from . import InputError

INSTALL = "pip install 'mixkv[demo]'"
# For SmolLM2.
PACKAGES = ("gguf", "accelerate")
INSTALL_PAGES = "pip install 'mixkv[pages]'"
# For drawing pages.
PAGES = ("PIL", "matplotlib")


def require(*modules: str, remedy: str = INSTALL) -> None:
    """Checks that ``modules`` can be imported.

    Raises:
        InputError: one is not installed; the message ends with ``remedy``.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} not installed: {remedy}")
