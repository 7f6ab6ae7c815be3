"""Pure functions on tensors: scores rank the rows of a prompt, methods allocate the budget."""

from .ranking import Ranking, Selection
from .select import quota, rank, select

__all__ = ["Ranking", "Selection", "quota", "rank", "select"]
