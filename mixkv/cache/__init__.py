"""What transformers holds: the cache, its layers, how a prompt becomes rows, statistics, saving and loading."""

from .cache import MixKVCache

__all__ = ["MixKVCache"]
