"""Which layers of a cache a forward has reached, so that one that was cut off is noticed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Reading a state after it was written means that the next forward has begun.
_READS = ("get_conv_state", "get_recurrent_state")
_WRITES = ("update_conv_state", "update_recurrent_state")


class Progress:
    """What has begun on the layers of a cache and has not ended: a forward, or a change of all layers.

    A forward calls `start_layer` and `finish_layer` for each attention layer, in any order, and `touch_state` and `finish_state`
    whenever a linear-attention layer reads or writes its state. It is complete when it has reached every layer. An exception needs
    no handler here: what it left unfinished is found by the next call. (For a single token, a linear-attention layer may change
    in place the state that it has read: an exception there is found unless it is the model's last layer.)

    Args:
        attention: indices of the layers that every forward updates.
        linear: indices of the layers with a linear-attention state. A compiled forward does not show here that it touches them,
            so they count only in a forward that has touched one of them.
    """

    # What must follow the present forward before another may begin; None: nothing.
    awaits: str | None = None

    def __init__(self, attention: Iterable[int] = (), linear: Iterable[int] = ()):
        self.attention, self.linear = frozenset(attention), frozenset(linear)
        # Of the present forward: layers to come, the attention layer at work, whether it brings a single token, linear-attention
        # layers whose state it has read, and (layer, method, state) touched.
        self.missing: set[int] = set()
        self.missing_linear: set[int] = set()
        self.current: int | None = None
        self.single = False
        self.read: set[int] = set()
        self.touched: set[tuple[int, str, int]] = set()
        self.last: int | None = None
        # The change of all layers that has begun.
        self.change: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the last forward has reached every layer, or none yet."""
        if self.current is not None or self.at_first_layer:
            return self.current is None
        return not self.missing and (not self.missing_linear or (self.single and self.missing_linear <= self.read))

    @property
    def may_begin(self) -> bool:
        """Whether a forward may begin, as far as the last one is concerned."""
        return self.complete and self.awaits is None

    @property
    def idle(self) -> bool:
        """Whether nothing has begun that has not ended."""
        return self.change is None and self.may_begin

    @property
    def at_first_layer(self) -> bool:
        """Whether the present forward has reached no layer but the one at work."""
        return len(self.missing) == len(self.attention) and not self.touched

    def check(self) -> None:
        """Raises a RuntimeError with the remedy if something has begun that has not ended."""
        if not self.idle:
            raise self._error()

    def start_layer(self, index: int, tokens: int) -> bool:
        """A forward is about to update attention layer ``index`` with so many tokens; returns whether it is a new forward.

        Raises:
            RuntimeError: the last forward, or a change, was cut off.
        """
        if self.change is not None or self.current is not None:
            raise self._error()
        new = self.complete
        if not self.may_begin if new else index not in self.missing:
            raise self._error()
        self.current = self.last = index
        if new:
            self._begin()
        self.single = tokens == 1
        return new

    def finish_layer(self) -> None:
        """The layer that was started has stored the new tokens."""
        self.missing.discard(self.current)
        self.current = None

    def touch_state(self, index: int, method: str, state: int) -> bool:
        """A forward is about to call ``method`` for ``state`` of layer ``index``; returns whether it is a new forward.

        Raises:
            RuntimeError: as `start_layer`.
        """
        if index not in self.linear:
            return False
        again = (index, method, state) in self.touched
        again |= method in _READS and any((index, name, state) in self.touched for name in _WRITES)
        # The last layer of a forward may touch its state after everything else has been reached.
        new = again or (self.complete and index != self.last)
        if self.change is not None or self.current is not None or (new and not self.may_begin):
            raise self._error()
        if new:
            self._begin()
        if not self.touched:
            self.missing_linear = set(self.linear)
        self.touched.add((index, method, state))
        self.missing_linear.add(index)
        self.read.discard(index)
        self.last = index
        return new

    def finish_state(self, index: int, method: str) -> None:
        """What `touch_state` was called for has been done."""
        if method in _READS:
            self.read.add(index)
        else:
            self.missing_linear.discard(index)

    def forget(self) -> None:
        """What had begun has been undone."""
        self.missing, self.missing_linear, self.touched, self.read = set(), set(), set(), set()
        self.current = self.last = self.change = self.awaits = None

    @contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Around a change of all layers between two forwards.

        Raises:
            RuntimeError: as `check`.
        """
        self.check()
        self.change = what
        yield
        self.change = None

    def _begin(self) -> None:
        self.missing, self.missing_linear, self.touched, self.read = set(self.attention), set(), set(), set()

    def _error(self) -> RuntimeError:
        return RuntimeError(
            f"this cache is broken: {self.change or self.awaits or 'a forward'} was cut off by an exception before it had reached every layer, so "
            f"that its layers hold different tokens. Call cache.reset() and read the prompt again, or go on from a copy made "
            f"earlier (copy.deepcopy(cache))"
        )
