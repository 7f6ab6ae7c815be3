"""Pictures of what a cache kept and what that costs. matplotlib is imported when one is drawn, not before."""

from .heads import budgets, redundancy
from .text import kept
from .tradeoff import tradeoff

__all__ = ["budgets", "kept", "redundancy", "tradeoff"]
"""Pictures of what a cache holds. matplotlib is imported only when something is drawn."""

from .patches import kept_patches

__all__ = ["kept_patches"]
