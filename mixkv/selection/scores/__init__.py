"""Scores: a number for each candidate and KV head, higher is kept. Pure functions, float32 throughout, one file a family.

A score is a function of a `mixkv.selection.context.ScoreContext`. To add one: a file that ends in `registry.add`, and its line
below.
"""

# ruff: noqa: F401, I001
# In the order in which they are listed.
from . import mix
from . import attention
from . import keydiff
from . import output
from . import replay
from . import gate

from .diversity import Directions, directions, modal_redundancy, redundancy, similarity
from ...ops.mixing_reference import match, pool

__all__ = ["Directions", "directions", "match", "modal_redundancy", "pool", "redundancy", "similarity"]
