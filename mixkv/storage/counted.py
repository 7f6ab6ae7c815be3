"""Numbers on the host that compiled decode steps raise on the device: brought up to date when they are asked for."""

from __future__ import annotations

from typing import Any


class Steps:
    """How many decode steps have run on the device that the layers of a cache have not counted."""

    def __init__(self) -> None:
        self.count = 0


class Counted:
    """An attribute that decode steps change.

    Its owner has `count_steps`, which brings all such attributes in its ``__dict__`` up to date.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        owner.count_steps()
        try:
            return owner.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, owner: Any, value: Any) -> None:
        owner.count_steps()
        owner.__dict__[self.name] = value


class CountsSteps:
    """An object with `Counted` attributes: `follow` the steps that change them.

    A class attribute says that none are followed, as in objects pickled without them.
    """

    _steps: Steps | None = None
    _counted = 0

    def follow(self, steps: Steps | None) -> None:
        """From now on, each of ``steps`` changes the attributes; None: nothing does."""
        self.count_steps()
        self._steps, self._counted = steps, 0 if steps is None else steps.count

    def count_steps(self) -> None:
        """Brings the attributes up to date."""
        if self._steps is not None and (new := self._steps.count - self._counted):
            self._counted = self._steps.count
            self._add_steps(new)

    def _add_steps(self, new: int) -> None:
        raise NotImplementedError
