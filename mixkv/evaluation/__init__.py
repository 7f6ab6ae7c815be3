"""Measuring compressed caches: the functions behind the commands of ``mixkv``. Not imported by `import mixkv`."""


class InputError(ValueError):
    """Invalid input, or a package that is not installed. The message is one line and names the remedy."""
