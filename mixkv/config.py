"""MixKVConfig: every choice a compressed cache depends on, validated, frozen, and JSON in and out."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import registry
from .byte_budget import AUTO, parse_bytes
from .head_profile import Profile, Table, as_profile, as_table
from .head_profile import load as load_profile


@dataclass(frozen=True)
class MixKVConfig:
    """How a prompt's keys and values are compressed.

    A config does not change; `replace` makes another. It is stored with a saved cache.

    Args:
        method: how the budget is allocated to KV heads. ``snapkv`` every head the same (arXiv 2404.14469), ``pyramidkv`` fewer
            in later layers (2406.02069), ``adakv`` among the heads of a layer by importance (2407.11550), ``sparsemm`` over the
            whole model by ``profile`` (2506.05344), ``global`` over the whole model, prompt by prompt, by what entries add to
            the layers' outputs, ``hybridkv`` as `mixkv.selection.hybrid` does: heads of sparse attention are pruned, the others
            keep all entries in chunks and attend to some of them (after 2604.05887), to how many is allocated as under
            ``global``; or one of your own: `mixkv.register_method`.
        score: which entries a head keeps. ``mix`` importance and diversity in proportion to the head's redundancy
            (MixKV, 2510.20707), ``mix-fixed`` their plain mean, ``attn`` window attention (SnapKV), ``vnorm`` attention
            plus value norm, ``knorm`` attention minus key norm, ``keydiff`` diversity alone (2504.15364), ``output`` window
            attention times what the entry adds to the layer's output, ``mix-output`` that mixed with diversity as in ``mix``,
            ``replay`` the largest attention while the model repeats the prompt (KVzip, 2505.23416), for questions that come later,
            ``replay-window`` that and the window's, for prompts that end with a question; or one of your own:
            `mixkv.register_score`.
        budget: entries kept per KV head and layer, on average, window included (int); or a share of the prompt (float in
            (0, 1]); or the bytes of all entries that a prompt may keep, whatever ``rows`` is (str): such as ``"64MiB"``, or
            ``"10%"`` of the bytes that the full cache of the prompt takes. Of bytes all layers have equal parts on average; they
            are those of keys, values, scales and positions, without the room for tokens to come. A prompt no longer than its
            budget is kept whole. Or ``"auto"``: all entries whose score exceeds ``threshold``, and the window, whatever share of
            the prompt that is; for ``global`` with a score whose numbers can be compared between heads and layers.
        threshold: see ``budget``. The built-in scores are attention weights, or predictions of them; with the default about a
            quarter of a text of 1,024 tokens is kept.
        window: the last prompt tokens, whose queries score the others; always kept.
        kernel_size: width of the pooling of attention over neighbouring positions; odd.
        output_kernel_size: width of the max pooling of output importance, for ``output``, ``mix-output``, ``global`` and
            ``hybridkv``; odd.
        pooling: ``avg`` or ``max``.
        group_reduce: ``mean`` or ``max`` over the query heads that share a KV head.
        redundancy: ``online`` (measured on every prompt) or a table of numbers in [0, 1], one row a layer, one number a
            KV head.
        pyramid_beta: pyramidkv's steepness: the last layer keeps ``budget_without_window // pyramid_beta`` candidates.
        ada_floor: the share of adakv's budget that goes out in equal parts.
        sparsemm_floor: the share of sparsemm's budget that goes out in equal parts.
        global_floor: the share of global's budget that goes out in equal parts.
        layer_exponent: layer normalisation exponent of ``global`` and ``hybridkv``: a layer's importance is divided by its largest
            to this power before it is compared with other layers'. 0: as it is; 1: every layer's largest is 1.
        hybrid_threshold: hybridkv's heads are pruned if at least this share of their attention rests on the prompt's first tokens
            and the window; 1: none is.
        hybrid_floor: the share of hybridkv's entries that goes out in equal parts: of those left to a layer's pruned heads, and,
            as chunks a step, of the other heads' of the whole model.
        hybrid_chunk: tokens of the chunks that hybridkv's other heads choose from. Small ones find more with as many tokens, but
            each has bounds that stay resident, a byte for every element of a key: at 8 tokens in float16 a 32nd of the prompt in
            all.
        hybrid_first: how many of the prompt's first tokens hybridkv's other heads always keep resident.
        hybrid_last: how many of its last, within the window.
        offload: whether hybridkv's chunks lie in the host's memory and cross over when they are chosen; False: they stay on
            the model's device, and only what is read of them a step is saved.
        profile: sparsemm's head scores: a table (layers x query heads, or layers x KV heads) or the path of a file with
            one, JSON or what ``mixkv calibrate`` writes; see `mixkv.head_profile`. Layers are those that attend to everything.
        gate: for the score ``gate``, the path of a file that ``mixkv.calibrate`` wrote. None: one that comes with mixkv, if it fits
            the model; else one is fitted when it is first needed, and kept in mixkv's cache folder.
        refit: whether the values of kept rows are changed by ridge regression so that the window's queries get what they got from
            the whole prompt; see `mixkv.selection.refit`. Where nothing was evicted they stay as they are. Of ``hybridkv``
            those of pruned heads are.
        decode_budget: bound for what generation adds: once a layer has more than ``decode_budget + decode_slack`` entries per
            KV head it is compressed again to ``decode_budget``, with the last ``window`` queries. None: nothing that came after
            the first prompt is ever evicted.
        decode_slack: see ``decode_budget``.
        decode_decay: what entries were worth at earlier evictions of a generation counts so much, and what the last queries say the
            rest; 0: the last queries decide alone.
        turns: which turns of a conversation are compressed. ``first`` the prompt alone, later turns are kept whole; ``each`` every
            later turn of more than ``window`` tokens, too, to a ``budget`` of its own, and what earlier turns left is not touched;
            ``all`` all that is held competes again for ``budget`` after each turn, so that no more is held than the budget, the
            turn being read and what was generated since the turn before.
        replay_chunk: for the scores ``replay`` and ``replay-window``, how many tokens of the prompt one forward repeats, at most; each sees only those and the
            prompt's first four.
        rows: how the kept keys and values are stored: ``full`` in the model's dtype, ``int8`` in 8 bits an element with a float16
            scale for each key and each value, ``int4`` the selected entries in 4 bits, rotated, and the window and later tokens in
            8. Scores are computed from the model's keys and values whatever the format.
        backend: what runs the operations on storage: ``native`` (compiled), ``varlen``, ``flash``, ``torch``, or ``auto``; see
            `mixkv.ops.dispatch`.
        compile: whether ``generate`` compiles decode steps to one graph each (torch.compile). The first call takes long; see
            `mixkv.cache.stepped`.

    Raises:
        ValueError: a value is out of range; the message names it and what is allowed.
    """

    method: str = "global"
    score: str = "mix-output"
    budget: int | float | str = 128
    window: int = 32
    kernel_size: int = 5
    pooling: str = "avg"
    group_reduce: str = "mean"
    redundancy: str | Table = "online"
    pyramid_beta: int = 20
    ada_floor: float = 0.2
    global_floor: float = 0.1
    hybrid_threshold: float = 0.9
    hybrid_floor: float = 0.4
    hybrid_chunk: int = 8
    offload: bool = True
    profile: Table | str | None = None
    decode_budget: int | None = None
    decode_slack: int = 64
    backend: str = "auto"
    output_kernel_size: int = 9
    sparsemm_floor: float = 0.1
    layer_exponent: float = 2 / 3
    hybrid_first: int = 4
    hybrid_last: int = 8
    replay_chunk: int = 1024
    rows: str = "full"
    refit: bool = False
    gate: str | None = None
    turns: str = "first"
    decode_decay: float = 0.5
    compile: bool = False
    threshold: float = 0.02

    def __post_init__(self) -> None:
        registry.method(self.method)
        registry.score(self.score)
        if registry.row_format(self.rows).codes and registry.method(self.method).keeps_chunks:
            raise ValueError(
                f"rows={self.rows!r} does not go with method={self.method!r}, whose chunks are in the model's dtype: leave rows "
                f"out, or use another method"
            )
        _one_of("backend", self.backend, registry.BACKENDS)
        _one_of("pooling", self.pooling, ("avg", "max"))
        _one_of("group_reduce", self.group_reduce, ("mean", "max"))
        _one_of("turns", self.turns, ("first", "each", "all"))
        _positive_int("window", self.window)
        for name in ("kernel_size", "output_kernel_size"):
            _positive_int(name, getattr(self, name))
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"{name}={getattr(self, name)} must be odd, so that pooling keeps positions in place")
        for name in ("pyramid_beta", "decode_slack", "hybrid_chunk", "hybrid_last", "replay_chunk"):
            _positive_int(name, getattr(self, name))
        if self.hybrid_first != 0:
            _positive_int("hybrid_first", self.hybrid_first)
        for name in (
            "decode_decay",
            "ada_floor",
            "sparsemm_floor",
            "global_floor",
            "layer_exponent",
            "hybrid_floor",
            "hybrid_threshold",
        ):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be a number from 0 to 1")
        for name in ("offload", "refit", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if not _is_number(self.threshold) or not 0 <= self.threshold < float("inf"):
            raise ValueError(f"threshold={self.threshold!r} must be a number of at least 0: a score that entries are to exceed")
        if isinstance(self.gate, Path):
            object.__setattr__(self, "gate", str(self.gate))
        if self.gate is not None and not isinstance(self.gate, str):
            raise ValueError(f"gate={self.gate!r} must be the path of a file that mixkv.calibrate wrote, or None")
        self._check_budget()
        self._check_tables()

    def _check_budget(self) -> None:
        budget = self.budget
        if budget == AUTO:
            self._check_auto()
        elif isinstance(budget, str):
            parse_bytes(budget)
        elif not _is_number(budget):
            raise ValueError(
                f"budget={budget!r} must be an int (entries per KV head), a float in (0, 1] (share of the prompt), bytes such as "
                f"'64MiB' or '10%' (of the full cache's), or 'auto'"
            )
        if isinstance(budget, float) and not 0 < budget <= 1:
            raise ValueError(f"budget={budget} as a share of the prompt must lie in (0, 1]; entries are given as an int")
        if isinstance(budget, int) and budget <= self.window:
            raise ValueError(
                f"budget={budget} must exceed window={self.window}: the window is always kept and counts in the budget. "
                f"Raise the budget or lower the window"
            )
        if self.turns != "first" and not registry.method(self.method).turns:
            raise ValueError(
                f"turns={self.turns!r} does not go with method={self.method!r}, which keeps later turns whole: leave it out, or use "
                f"another method"
            )
        if self.turns == "all" and (isinstance(budget, float) or str(budget).endswith("%")):
            raise ValueError(
                f"budget={budget} is a share of a prompt, and turns='all' needs a bound on all that is held: give budget as an int"
            )
        if self.decode_budget is not None and not registry.method(self.method).decode_budget:
            raise ValueError(
                f"decode_budget={self.decode_budget} does not go with method={self.method!r}, which keeps all that is generated: "
                f"leave it out, or use another method"
            )
        if self.decode_budget is not None and registry.score(self.score).needs_replay:
            raise ValueError(
                f"decode_budget={self.decode_budget} does not go with score={self.score!r}, which is known of the prompt alone: leave it "
                f"out, or use another score"
            )
        if self.decode_budget is not None:
            _positive_int("decode_budget", self.decode_budget)
            if self.decode_budget <= self.window:
                raise ValueError(
                    f"decode_budget={self.decode_budget} must exceed window={self.window}: raise it, or lower the window"
                )

    def _check_auto(self) -> None:
        if not registry.method(self.method).follows_threshold:
            others = ", ".join(name for name, other in registry.METHODS.items() if other.follows_threshold)
            raise ValueError(
                f"budget='auto' does not go with method={self.method!r}, which needs a number of entries to allocate: give one, or "
                f"use another method ({others})"
            )
        if not registry.score(self.score).comparable:
            others = ", ".join(name for name, other in registry.SCORES.items() if other.comparable)
            raise ValueError(
                f"budget='auto' does not go with score={self.score!r}, whose numbers cannot be compared between heads and layers: "
                f"give a number of entries, or use another score ({others})"
            )
        if self.turns == "all":
            raise ValueError("budget='auto' is no bound, and turns='all' needs one on all that is held: give budget as an int")

    def _check_tables(self) -> None:
        if isinstance(self.redundancy, str):
            _one_of("redundancy", self.redundancy, ("online",))
        else:
            table = as_table("redundancy", self.redundancy)
            if not all(0 <= value <= 1 for row in table for value in row):
                raise ValueError("redundancy as a table must have numbers from 0 to 1: mean cosines between keys")
            object.__setattr__(self, "redundancy", table)
        profile = self.profile
        if isinstance(profile, (str, Path)):
            profile = load_profile(profile)
        if profile is not None:
            profile = as_profile("profile", profile)
            if any(value < 0 for row in profile for value in row) or sum(map(sum, profile)) <= 0:
                raise ValueError("profile must have scores >= 0 with a positive sum: they are shares of the whole budget")
            object.__setattr__(self, "profile", profile)
        if profile is None and registry.method(self.method).needs_profile:
            raise ValueError(
                f"method={self.method!r} needs profile=: a table of head scores [layers, heads] or the path of a file with one "
                f"(mixkv calibrate makes it)"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Fields that came later have their defaults.
        self.__dict__.update({field.name: field.default for field in dataclasses.fields(self)} | state)
        # A method or a score of the user's may not be registered in the process that unpickles.
        registry.method(self.method)
        registry.score(self.score)

    def replace(self, **changes: Any) -> MixKVConfig:
        """A copy with some fields changed, validated again."""
        known = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise ValueError(f"unknown option {name}={changes[name]!r}; MixKVConfig has {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings."""
        return json.loads(self.to_json())

    def to_json(self, **options: Any) -> str:
        """JSON text; `from_json` returns an equal config. ``options`` are passed to `json.dumps`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.profile, Profile):
            values["profile"] = self.profile.to_json_value()
        return json.dumps(values, **options)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MixKVConfig:
        """The inverse of `to_dict`; fields that are missing have their defaults.

        Raises:
            ValueError: unknown names, or values that are not allowed.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a config must be a dict of options, not {values!r}: give what to_dict returns")
        return cls().replace(**values)

    @classmethod
    def from_json(cls, text: str) -> MixKVConfig:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))


def checked_config(config: MixKVConfig | None, **options: Any) -> MixKVConfig:
    """``config``, or the default one, with fields changed to ``options``.

    Raises:
        ValueError: something else was given as ``config``, or an option is unknown or not allowed.
    """
    if config is not None and not isinstance(config, MixKVConfig):
        remedy = "MixKVConfig.from_dict(...)" if isinstance(config, dict) else "mixkv.MixKVConfig(...)"
        raise ValueError(
            f"config must be a MixKVConfig, not the {type(config).__name__} {config!r}: make one with {remedy}, or give options by "
            f"name, such as method='global', budget=128"
        )
    config = MixKVConfig() if config is None else config
    return config.replace(**options) if options else config


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(allowed)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive int")
