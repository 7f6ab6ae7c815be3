"""Pictures of what a cache keeps and what that costs. matplotlib and ipywidgets are imported when something is drawn."""

from .heads import budgets, redundancy, sparsity
from .patches import kept_patches
from .slider import explore
from .text import kept
from .tradeoff import tradeoff

__all__ = ["budgets", "explore", "kept", "kept_patches", "redundancy", "sparsity", "tradeoff"]
