"""Answer quality against the size of the cache: a line for each method and score, a point for each budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .canvas import axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FULL = "full"
# The number of the records that is drawn: the first one that they have, and the label of its axis.
_QUALITIES = {"kl": "KL to the full cache (nats per token)", "mean_kl": "KL to the full cache (nats per token)"}
_SIZES = {"bytes": "size of the cache (MiB)", "budget": "budget (entries per KV head)"}


def tradeoff(
    results: Iterable[Mapping[str, Any]], *, quality: str | None = None, size: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draws quality against size, a line for each method and score.

    Args:
        results: one record per run, in any order, such as `mixkv.evaluation.compare.run` returns and `mixkv compare --json`
            writes under ``runs``::

                {"method": "adakv", "score": "mix", "budget": 128, "bytes": 6.7e6,
                 "kl": 0.23, "kl_low": 0.19, "kl_high": 0.28}

            ``method`` and ``score`` name the line; ``budget`` or ``bytes`` (or another number, named by ``size``) is the
            point's place on it; the quality is ``kl``, ``mean_kl`` or the number named by ``quality``. ``<quality>_low`` and
            ``<quality>_high``, where a record has both, are the ends of its confidence interval. Records of method ``full``
            are a horizontal line.
        quality: which number is the answer's quality; by default the first of ``kl``, ``mean_kl`` that there is.
        size: which number is the cache's size; by default the first of ``bytes``, ``budget`` that all records have.
        ax: where to draw; a new figure by default.

    Returns: the Axes.

    Raises:
        ValueError: no records, or one lacks a number; the message names it.
        ImportError: matplotlib is not installed.
    """
    records = list(results)
    if not records:
        raise ValueError("results is empty: give one record per run, such as mixkv compare --json writes under runs")
    quality = quality or next((name for name in _QUALITIES if name in records[0]), "kl")
    compressed = [record for record in records if record.get("method") != FULL]
    size = size or next((name for name in _SIZES if all(name in record for record in compressed)), "bytes")
    drawn = lines(compressed, quality, size)
    ax = axes(ax, 6.0, 4.0)
    for name, points in drawn.items():
        sizes, values, low, high = zip(*points)
        sizes = tuple(part / 2**20 for part in sizes) if size == "bytes" else sizes
        errors = [[value - end for value, end in zip(values, low)], [end - value for value, end in zip(values, high)]]
        ax.errorbar(sizes, values, yerr=errors if any(map(any, errors)) else None, marker="o", capsize=3, label=name)
    for record in records:
        if record.get("method") == FULL and record.get(quality) is not None:
            ax.axhline(record[quality], color="grey", linestyle="--", label="full cache")
    ax.set_xlabel(_SIZES.get(size, size))
    ax.set_ylabel(_QUALITIES.get(quality, quality))
    ax.legend()
    return ax


def lines(records: list[Mapping[str, Any]], quality: str, size: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """Points (size, quality, low, high) in order of size, by ``"method, score"``; without an interval, low and high equal the quality.

    Raises:
        ValueError: a record lacks a number.
    """
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for index, record in enumerate(records):
        for name in ("method", "score", size, quality):
            if record.get(name) is None:
                raise ValueError(
                    f"record {index} of results ({record.get('method')}, {record.get('score')}, budget {record.get('budget')}) has no "
                    f"{name!r}: give every record one, or choose another number with quality= or size="
                )
        value = record[quality]
        interval = (record.get(f"{quality}_low"), record.get(f"{quality}_high"))
        low, high = (value, value) if None in interval else interval
        if not low <= value <= high:
            raise ValueError(f"record {index} of results has {quality}={value} outside its interval from {low} to {high}")
        found.setdefault(f"{record['method']}, {record['score']}", []).append((record[size], value, low, high))
    return {name: sorted(points) for name, points in found.items()}
