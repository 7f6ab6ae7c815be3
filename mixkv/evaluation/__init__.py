"""Measuring compressed caches: what `mixkv demo`, `compare` and `bench` run. Not imported by `import mixkv`."""


class InputError(ValueError):
    """Something the user gave, or has not installed, is in the way; the message is one line, with the remedy."""
