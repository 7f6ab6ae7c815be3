"""Plots of what a cache keeps and what that costs. matplotlib is imported when a plot is drawn."""

from .heads import budgets, redundancy, sparsity
from .patches import kept_patches
from .text import kept
from .tradeoff import tradeoff

__all__ = ["budgets", "kept", "kept_patches", "redundancy", "sparsity", "tradeoff"]
