"""Whether SmolLM2 can be had here, and the mark of tests that need it."""

import os
from functools import cache
from importlib.util import find_spec

import pytest

from mixkv.evaluation import InputError, smollm2


@cache
def missing() -> str | None:
    """Why SmolLM2 cannot be loaded; None if it can. Where ``CI`` is set that is an error and no reason to skip."""
    absent = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: pip install 'mixkv[demo]'"
    try:
        smollm2.load()
    except InputError as error:
        if os.environ.get("CI"):
            raise
        return str(error)
    return None


def require_smollm2() -> None:
    """Skips the test that calls it where SmolLM2 cannot be loaded."""
    if missing() is not None:
        pytest.skip(missing())


@pytest.fixture(scope="session")
def needs_smollm2():
    require_smollm2()
