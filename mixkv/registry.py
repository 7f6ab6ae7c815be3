"""Methods, scores and row formats by name: those built in, and the user's. Also the names of back ends."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BACKENDS = ("auto", "native", "varlen", "flash", "torch")
# The command line joins names with these: snapkv+mix, adakv,global.
_NAME = re.compile(r"[A-Za-z][\w.-]*")


@dataclass(frozen=True)
class Method:
    """How the budget is allocated to KV heads: within a layer, or over all layers of the model.

    Attributes:
        name: of ``MixKVConfig(method=name)``.
        description: one line for tables.
        paper: arXiv number; None: not published.
        allocate: ``allocate(context) -> entries``: the number of candidates [B, Hkv] (int64) that each head of a layer keeps
            beside its observation window; ``context`` is a `mixkv.selection.context.AllocationContext`. None for a method
            with a ``plan``.
        new_budget: ``new_budget(config, num_layers, patient=False, limits=None) -> budget``: makes the budget that the layers of
            one prompt share, see `mixkv.selection.global_budget`; None: every layer has its own.
        plan: divides heads into those that are pruned and those that keep all entries in chunks, see
            `mixkv.selection.hybrid.plan`; None: all heads are pruned.
        options: fields of `MixKVConfig` that the allocation reads and no score does.
        needs_profile: whether it reads ``MixKVConfig(profile=...)``.
        uses_importance: whether it reads the candidates' importance; under tensor parallelism that of all heads is gathered.
        uses_output_importance: whether that importance is `ScoreContext.output_importance`, whatever the score.
        decode_budget: whether it works with ``MixKVConfig(decode_budget=...)``.
        turns: whether it works with ``MixKVConfig(turns=...)`` other than ``first``.
        follows_threshold: whether it works with ``MixKVConfig(budget="auto")``: it keeps the highest scores of all heads, so that
            with a threshold there is nothing to allocate.
        tensor_parallel: whether it works where each process has some of a layer's KV heads.
        built_in: False for the user's.
    """

    name: str
    allocate: Callable[[Any], Any] | None = None
    description: str = ""
    paper: str | None = None
    new_budget: Callable[..., Any] | None = None
    plan: Callable[..., Any] | None = None
    options: tuple[str, ...] = ()
    needs_profile: bool = False
    uses_importance: bool = False
    uses_output_importance: bool = False
    decode_budget: bool = True
    turns: bool = True
    follows_threshold: bool = False
    tensor_parallel: bool = True
    built_in: bool = True

    @property
    def cross_layer(self) -> bool:
        """Whether the layers of a model share one budget."""
        return self.new_budget is not None

    @property
    def drafts_with_prompt(self) -> bool:
        """Whether drafts of assisted decoding may be read in the forward of the prompt.

        Greedy decoding would see what is left after the last layer; drafts see an earlier layer before that is known.
        """
        return not self.cross_layer

    @property
    def keeps_chunks(self) -> bool:
        """Whether some heads keep all entries in chunks."""
        return self.plan is not None


@dataclass(frozen=True)
class Score:
    """Which entries a head keeps: a number for each candidate, higher is kept.

    Attributes:
        name: of ``MixKVConfig(score=name)``.
        compute: ``compute(context) -> scores`` [B, Hkv, M]; ``context`` is a `mixkv.selection.context.ScoreContext`.
        description: one line for tables.
        paper: arXiv number; None: not published.
        uses_output_importance: whether importance, for the score and for methods such as ``adakv``, is window attention times
            what an entry adds to the layer's output, in place of window attention.
        comparable: whether the scores, all >= 0, of different heads and layers can be compared as they are. Methods that allocate by importance
            then use the scores in its place, ``global`` without normalising layers; and they can be compared with a threshold.
        needs_replay: whether the score is computed from what a replay of the prompt measures.
        needs_gate: whether the score is computed by a gate that was fitted to the model.
        built_in: False for the user's.
    """

    name: str
    compute: Callable[[Any], Any]
    description: str = ""
    paper: str | None = None
    uses_output_importance: bool = False
    comparable: bool = False
    needs_replay: bool = False
    needs_gate: bool = False
    built_in: bool = True


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a cache are stored.

    Attributes:
        name: of ``MixKVConfig(rows=name)``.
        rows: ``rows(key, value, selection, backend) -> rows``: a `mixkv.storage.rows.Rows` with the entries of key [B, Hkv, N, D]
            and value [B, Hkv, N, Dv] that ``selection`` keeps.
        row_bytes: ``row_bytes(key_size, value_size, itemsize) -> bytes`` of the key and the value of a selected entry;
            ``itemsize`` is that of the model's dtype.
        recent_bytes: likewise of an entry of the window or of a token that came later.
        description: one line for tables.
        codes: whether rows are codes with scales.
        packs: whether selected rows lie in a store of their own, a `mixkv.storage.packed.PackedStore`.
        built_in: False for the user's.
    """

    name: str
    rows: Callable[..., Any]
    row_bytes: Callable[[int, int, int], int]
    recent_bytes: Callable[[int, int, int], int]
    description: str = ""
    codes: bool = False
    packs: bool = False
    built_in: bool = True


METHODS: dict[str, Method] = {}
SCORES: dict[str, Score] = {}
FORMATS: dict[str, RowFormat] = {}


def add(entry: Method | Score | RowFormat) -> None:
    """Adds a method, a score or a row format; one that has its name is replaced, unless it is built in.

    Raises:
        ValueError: the name cannot be used.
    """
    kinds: dict[type, tuple[str, dict[str, Any]]]
    kinds = {Method: ("method", METHODS), Score: ("score", SCORES), RowFormat: ("row format", FORMATS)}
    kind, entries = kinds[type(entry)]
    if not isinstance(entry.name, str) or not _NAME.fullmatch(entry.name):
        raise ValueError(
            f"{kind} name {entry.name!r} must be a letter followed by letters, digits, '-', '_' or '.': take another name"
        )
    if entry.name in entries and entries[entry.name].built_in:
        raise ValueError(f"{kind} {entry.name!r} is built in: take another name")
    entries[entry.name] = entry


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    return _find("method", METHODS, name)


def score(name: str) -> Score:
    """The score of that name.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    return _find("score", SCORES, name)


def row_format(name: str) -> RowFormat:
    """The row format of that name.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"unknown rows={name!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[name]


def register_method(name: str, function: Callable[[Any], Any], *, uses_output_importance: bool = False) -> None:
    """Makes ``MixKVConfig(method=name)`` allocate a layer's budget by ``function``.

    A cache refers to its method by name: register it in every process that uses, loads or unpickles such a cache.

    Args:
        name: registering it again replaces it.
        function: ``function(context) -> entries``, as of the built-in methods: ``context`` is a
            `mixkv.selection.context.AllocationContext` of one layer, ``entries`` an integer tensor [B, Hkv] with the number of
            candidates that each head keeps beside its observation window, at most ``context.candidates``.
        uses_output_importance: whether ``context.importance`` is what entries add to the layer's output, as for ``global``, or
            the score's own importance.

    Raises:
        ValueError: the name is a built-in method's or no name, or ``function`` cannot be called with a context.

    Example:
        >>> mixkv.register_method("equal", lambda context: context.apportion(torch.ones_like(context.candidates)))
    """
    if not _takes(function, 1):
        raise ValueError(f"method {name!r} was given {function!r}: give a function of one argument, the AllocationContext")
    add(Method(name, function, uses_importance=True, uses_output_importance=uses_output_importance, built_in=False))


def register_score(
    name: str, function: Callable[..., Any], *, uses_output_importance: bool = False, comparable: bool = False
) -> None:
    """Makes ``MixKVConfig(score=name)`` keep the entries for which ``function`` is highest.

    A cache refers to its score by name: register it in every process that uses, loads or unpickles such a cache.

    Args:
        name: registering it again replaces it.
        function: ``function(context) -> scores``, as of the built-in scores: ``context`` is a
            `mixkv.selection.context.ScoreContext` of one layer, ``scores`` a tensor [B, Hkv, M], a number for each candidate;
            those of padding are ignored. A function of four arguments is called with ``context.attention``,
            ``context.key_float32``, ``context.value`` and ``context.redundancy``.
        uses_output_importance: whether ``context.importance``, by which heads compete under ``adakv``, is
            ``context.output_importance`` in place of ``context.attention``.
        comparable: whether ``function``'s numbers can be compared between heads and layers as they are: methods such as
            ``adakv`` and ``global`` then allocate by them.

    Raises:
        ValueError: the name is a built-in score's or no name, or ``function`` cannot be called so.

    Example:
        >>> mixkv.register_score("large-values", lambda context: context.attention * context.value_norm)
    """
    compute = function
    if not _takes(function, 1):
        if not _takes(function, 4):
            raise ValueError(f"score {name!r} was given {function!r}: give a function of one argument, the ScoreContext")

        def compute(context):
            return function(context.attention, context.key_float32, context.value, context.redundancy)

    add(Score(name, compute, uses_output_importance=uses_output_importance, comparable=comparable, built_in=False))


def _find(kind: str, entries: dict[str, Any], name: Any) -> Any:
    if not isinstance(name, str) or name not in entries:
        raise ValueError(
            f"unknown {kind} {name!r}; choose from {', '.join(entries)}, or register your own first: "
            f"mixkv.register_{kind}({name!r}, function)"
        )
    return entries[name]


def _takes(function: Any, count: int) -> bool:
    """Whether ``function`` can be called with so many positional arguments, as far as its signature shows."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        # Some compiled functions have no signature.
        return True
    return True
