"""WeakMethod: a function bound to the model whose attribute it is, without keeping that model alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel


class WeakMethod:
    """Calls ``function(model, ...)``. A method would put the model into a reference cycle, which frees its memory late.

    A copy of the model gets one that is bound to the copy.

    Args:
        function: a module's function, which can be pickled.
        model: whose attribute this becomes.
    """

    def __init__(self, function: Callable, model: PreTrainedModel):
        self.function, self._model = function, weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self._model(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakMethod:
        model = self._model()
        return type(self)(self.function, memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function, self._model())


class Override(WeakMethod):
    """Stands in for the method of its function's name; pickled, it becomes that method again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model(), self.function.__name__)
