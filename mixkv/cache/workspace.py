"""Workspace: the tensors that compiled decode steps of a model use, kept for its next cache, so that nothing compiles anew."""

from __future__ import annotations

import threading
import weakref

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..hf.fixed_window import FixedWindow
from ..storage.arena import Arena, ArenaStore, Kind
from ..storage.counted import Steps
from ..storage.ragged import RaggedStore


class Workspace:
    """An arena for each kind of store, and a window for each sliding-window layer."""

    def __init__(self) -> None:
        self.owner: weakref.ref | None = None
        self._arenas: dict[Kind, Arena] = {}
        self._windows: dict[int, list[FixedWindow]] = {}

    @property
    def free(self) -> bool:
        return self.owner is None or self.owner() is None

    def window(self, index: int, layer: DynamicSlidingWindowLayer) -> FixedWindow:
        """A copy of what ``layer``, layer ``index`` of its cache, holds."""
        windows = self._windows.setdefault(index, [])
        found = next((window for window in windows if window.fits(layer)), None)
        if found is None:
            found = FixedWindow(layer)
            windows.append(found)
        found.take(layer)
        return found

    def take(self, stores: list[RaggedStore], least: int, room: int, steps: Steps) -> list[ArenaStore]:
        """Copies the rows of all ``stores`` here, with room for ``room`` more of each sequence, which ``steps`` counts.

        ``least``: rows for which there is a place in each sequence on average, whether there are so many or not.
        """
        groups: dict[Kind, list[int]] = {}
        for index, store in enumerate(stores):
            groups.setdefault(Kind.of(store), []).append(index)
        found: dict[int, ArenaStore] = {}
        for kind, members in groups.items():
            # What lies here already would be read while it is overwritten.
            held = [store.detached() if isinstance(store, ArenaStore) else store for store in (stores[i] for i in members)]
            sequences = sum(store.lengths.numel() for store in held)
            rows = max(sum(store.total for store in held), least * sequences) + room * sequences
            arena = self._arenas.get(kind)
            if arena is None or arena.rows < rows:
                # What has grown once grows again, and each time a step is compiled anew.
                least_rows = rows if arena is None else max(rows, 2 * arena.rows)
                arena = self._arenas[kind] = Arena(kind, Arena.rows_for(least_rows))
            found |= zip(members, arena.take(held, steps))
        return [found[index] for index in range(len(stores))]


_LOCK = threading.Lock()
_workspaces: weakref.WeakKeyDictionary[PreTrainedModel, list[Workspace]] = weakref.WeakKeyDictionary()


def acquire(model: PreTrainedModel, owner: object) -> Workspace:
    """The workspace that is ``owner``'s as long as that exists: the one it has, one that is free, or a new one."""
    with _LOCK:
        held = _workspaces.setdefault(model, [])
        own = next((space for space in held if space.owner is not None and space.owner() is owner), None)
        own = own or next((space for space in held if space.free), None) or Workspace()
        own.owner = weakref.ref(owner)
        held[:] = [own, *(space for space in held if space is not own and not space.free)]
        return own


def forget(model: PreTrainedModel) -> None:
    """Frees what no cache uses."""
    with _LOCK:
        _workspaces.pop(model, None)
