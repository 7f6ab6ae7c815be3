"""Paired statistics: differences between two caches on the same samples, with confidence intervals."""

from __future__ import annotations

from typing import Any

import torch

from ..config import MixKVConfig

_DRAWS = 4000
_LEVEL = 0.95


def relative_change(values: list[float], reference: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of ``values`` relative to the mean of ``reference``, minus 1, and its 95 % interval (paired bootstrap).

    Samples are drawn with replacement; the two numbers of a sample stay together.
    """
    pair = torch.tensor([values, reference], dtype=torch.float64)
    means = pair[:, draws(len(values), seed)].mean(dim=-1)
    return float(pair[0].mean() / pair[1].mean() - 1), *interval(means[0] / means[1] - 1)


def difference(values: list[float], reference: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean difference of paired numbers and its 95 % interval (bootstrap over samples)."""
    change = torch.tensor(values, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    return float(change.mean()), *interval(change[draws(len(change), seed)].mean(dim=-1))


def summary(
    records: list[dict[str, Any]], configs: list[dict[str, Any]], reference: tuple[str, str], *, equal_bytes: bool = False
) -> list[dict[str, Any]]:
    """Compares every config with the config of the same budget that ``reference`` names.

    Args:
        records: of `evaluate.run`.
        configs: the configs of their results, as dicts, in order.
        reference: method and score, of the first config of them. If it was not evaluated, the ``change`` keys are None.
        equal_bytes: compare with the smallest budget for which the reference has at least as many resident bytes, on average,
            within half a percent of the full cache's bytes.

    Returns: a dict per task, length and config, with task, tokens, method, score, budget, form (see `form`), samples; resident (None in older
        files); kl; kl_change, kl_low, kl_high (relative, with its interval); top1; answered and kept (sums; None if the task
        has no correct answers); kept_change, kept_low, kept_high (in answers per sample).
    """
    out = []
    for task, tokens in sorted({(record["task"], record["tokens"]) for record in records}):
        mine = [record for record in records if (record["task"], record["tokens"]) == (task, tokens)]
        for index, config in enumerate(configs):
            against = _against(mine, configs, index, reference, equal_bytes)
            results = [record["results"][index] for record in mine]
            others = None if against is None else [record["results"][against] for record in mine]
            right = mine[0]["answered"] is not None
            row = {
                "task": task,
                "tokens": tokens,
                **{name: config[name] for name in ("method", "score", "budget")},
                "form": form(config),
                "samples": len(mine),
                "resident": _mean(results, "resident") if "resident" in results[0] else None,
                "kl": _mean(results, "kl"),
                "top1": _mean(results, "top1"),
                "answered": sum(record["answered"] for record in mine) if right else None,
                "kept": sum(result["kept"] for result in results) if right else None,
            }
            change: tuple[float | None, ...] = (None,) * 3
            if others is not None:
                change = relative_change([r["kl"] for r in results], [r["kl"] for r in others])
            row |= dict(zip(("kl_change", "kl_low", "kl_high"), change))
            change = (None,) * 3
            if others is not None and right:
                change = difference([r["kept"] for r in results], [r["kept"] for r in others])
            row |= dict(zip(("kept_change", "kept_low", "kept_high"), change))
            out.append(row)
    return out


def form(config: dict[str, Any]) -> str:
    """What a config, as a dict, has besides method, score and budget, if it is not the default: " int4", " refit", " window 8"."""
    rows, refit, window = (config.get(name, getattr(MixKVConfig, name)) for name in ("rows", "refit", "window"))
    parts = (
        rows if rows != MixKVConfig.rows else "",
        "refit" if refit else "",
        f"window {window}" if window != MixKVConfig.window else "",
    )
    return "".join(f" {part}" for part in parts if part)


def _against(
    records: list[dict[str, Any]], configs: list[dict[str, Any]], index: int, reference: tuple[str, str], equal_bytes: bool
) -> int | None:
    """The index of the config to compare with; None if it was not evaluated."""
    found = [
        other for other, config in enumerate(configs) if (config["method"], config["score"], form(config)) == (*reference, "")
    ]
    if not equal_bytes:
        return next((other for other in found if configs[other]["budget"] == configs[index]["budget"]), None)
    resident = {other: _mean([record["results"][other] for record in records], "resident") for other in [*found, index]}
    enough = [other for other in found if resident[other] >= resident[index] - 0.005]
    return min(enough, key=resident.get, default=None)


def draws(count: int, seed: int) -> torch.Tensor:
    """Samples drawn with replacement: indices [draws, count]."""
    return torch.randint(count, (_DRAWS, count), generator=torch.Generator().manual_seed(seed))


def interval(drawn: torch.Tensor) -> tuple[float, float]:
    """The central 95 % interval of ``drawn``."""
    edge = (1 - _LEVEL) / 2
    low, high = torch.quantile(drawn, torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return low, high


def _mean(results: list[dict[str, Any]], name: str) -> float:
    return sum(result[name] for result in results) / len(results)
