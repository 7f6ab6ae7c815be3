"""Pure functions on tensors: scores rank the candidates of a prompt, methods allocate the budget."""

from . import methods, scores
from .context import AllocationContext, ScoreContext
from .ranking import Ranking, Selection
from .select import allocate, rank, select

__all__ = ["AllocationContext", "Ranking", "ScoreContext", "Selection", "allocate", "methods", "rank", "scores", "select"]
