"""The tables of README.md and docs/ that come from the registry and from benchmarks/results/.

python docs/tables.py NAME     print one table
python docs/tables.py --write  bring all files up to date

In a file a table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from mixkv import MixKVConfig, registry
from mixkv.evaluation import journal, pages, paired

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("form", "receipt", "two-pages", "screen")
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(?:(?!<!--).*\n)*?(<!-- end of table -->)")


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def readme() -> str:
    """Memory and speed at 4,096 tokens, and answers about pages, at a budget of 128."""
    rows = []
    for label, bench, evaluated in (
        ("full cache", "full", None),
        ("`snapkv`, `mix`", "snapkv", ("snapkv", "mix")),
        ("`adakv`, `mix`", "adakv", ("adakv", "mix")),
        ("`global`, `mix-output` (the default)", "global+mix-output", ("global", "mix-output")),
    ):
        run = _bench(bench, 4096)
        size = f"{run['bytes'] / 2**20:.1f} MiB ({run['bytes_to_full']:.1%})"
        step = f"{1000 * run['step_seconds']:.0f} ms ({run['step_to_full']:.0%})"
        rows.append([label, size, step, *(_percent(kind, evaluated, 128) for kind in KINDS[:3])])
    return table(["cache", "memory", "decode step", "answers: forms", "receipts", "two pages"], rows)


def methods() -> str:
    """Every method."""
    return table(
        ["`method`", "how the budget is allocated", "options", "paper"],
        (
            [
                f"`{method.name}`",
                method.description,
                ", ".join(f"`{name}={_default(name)}`" for name in method.options),
                _paper(method.paper),
            ]
            for method in registry.METHODS.values()
            if method.built_in
        ),
    )


def scores() -> str:
    """Every score."""
    built_in = (score for score in registry.SCORES.values() if score.built_in)
    return table(
        ["`score`", "which entries a head keeps", "paper"],
        ([f"`{score.name}`", score.description, _paper(score.paper)] for score in built_in),
    )


def formats() -> str:
    """Every row format, and the bytes of a selected entry with heads of 128 in bfloat16."""
    built_in = (chosen for chosen in registry.FORMATS.values() if chosen.built_in)
    rows = [[f"`{chosen.name}`", chosen.description, str(chosen.row_bytes(128, 128, 2))] for chosen in built_in]
    return table(["`rows`", "keys and values", "bytes of a selected entry (D = 128, bfloat16)"], rows)


def budgets() -> str:
    """Answers about pages by budget, averaged over four kinds of pages."""
    caches = (
        ("snapkv", "attn"),
        ("snapkv", "mix"),
        ("adakv", "mix"),
        ("adakv", "mix-output"),
        ("global", "mix"),
        ("global", "mix-output"),
    )
    sizes = (48, 64, 96, 128, 256)
    rows = [["full cache", *[_mean_percent(None, 128)] * len(sizes)]]
    rows += [[f"`{m}`, `{s}`", *(_mean_percent((m, s), size) for size in sizes)] for m, s in caches]
    profiled = ("eval_pages_sparsemm",)
    row = [_mean_percent(("sparsemm", "mix"), size, profiled) for size in sizes[:-1]]
    rows.append(["`sparsemm`, `mix`, with a profile of such pages", *row, ""])
    return table(["cache", *map(str, sizes)], rows)


def later() -> str:
    """Answers to questions that came after compression, by resident memory."""
    rows = []
    for budget, label in ((0.135, "snapkv"), (0.235, "snapkv")):
        for method, score in ((label, "mix"), ("adakv", "mix"), ("global", "mix-output"), ("hybridkv", "mix")):
            # hybridkv's bounds of chunks are resident beside its entries: a smaller budget has as many bytes.
            given = budget if method != "hybridkv" else round(budget - 0.035, 3)
            answered, kept, resident = _answers("eval_retrieval", "several", (method, score), given)
            shares = [_percent(f"{kind}-later", (method, score), given, ("eval_pages_later",)) for kind in KINDS[:3]]
            rows.append([f"`{method}`, `{score}`", f"{given:g}", f"{resident:.1%}", f"{kept} of {answered}", *shares])
    return table(["cache", "budget", "resident", "texts", "forms", "receipts", "two pages"], rows)


def once() -> str:
    """A context compressed before its questions: KL and answers on texts, answers on pages, by bytes."""
    former = ("eval_retrieval", "eval_pages_later")
    rows = []
    for label, method, score, budget in (
        ("`snapkv`, `mix`", "snapkv", "mix", 0.135),
        ("`global`, `mix-output` (the default of `generate`)", "global", "mix-output", 0.135),
        ("`hybridkv`, `mix`, all entries in host memory", "hybridkv", "mix", 0.1),
    ):
        rows.append([label, *_once(former, {"method": method, "score": score, "budget": budget})])
    own = ("eval_once_texts", "eval_once_pages")
    for kind, score in (("`mixkv.read`", "replay"), ('`score="gate"`', "gate")):
        for form, label in (("full", kind), ("int4", f'{kind}, `rows="int4"`')):
            for budget in ("13.5%", "6%", "4%"):
                given = {"method": "global", "score": score, "rows": form, "budget": budget}
                rows.append([f'{label}, `budget="{budget}"`', *_once(own, given)])
    titles = [f"{name} (of {_once_answered(kind)})" for name, kind in _ONCE_TASKS.items()]
    return table(["cache", "bytes", "texts: KL", *titles], rows)


def speed() -> str:
    """Memory and time of every method."""
    rows = []
    for tokens in (1024, 4096):
        for name in ("full", "snapkv", "pyramidkv", "adakv", "sparsemm", "global+mix-output"):
            run = _bench(name, tokens)
            rows.append(
                [
                    f"{tokens:,}",
                    ", ".join(f"`{part}`" for part in name.split("+")) if name != "full" else name,
                    f"{run['bytes'] / 2**20:.1f} MiB",
                    f"{run['bytes_to_full']:.1%}",
                    f"{run['compress_seconds'] / run['prefill_seconds']:.1%}",
                    f"{1000 * run['step_seconds']:.0f} ms",
                    f"{run['step_to_full']:.2f}",
                    f"{run['step_to_floor']:.2f}",
                ]
            )
    titles = ["tokens", "cache", "memory", "of full", "compression, of prefill", "decode step", "of full", "of floor"]
    return table(titles, rows)


def hybrid() -> str:
    """Memory and time of hybridkv on a long prompt."""
    rows = []
    for run in json.loads((RESULTS / "hybrid_smollm2_8k_cpu.json").read_text(encoding="utf-8"))["runs"]:
        rows.append(
            [
                run["cache"],
                f"{1000 * run['step_seconds']:.0f} ms",
                f"{run['step_to_full']:.2f}",
                f"{run['bytes_resident'] / 2**20:.0f} MiB",
                f"{run['bytes_outside'] / 2**20:.0f} MiB",
                f"{run['bytes_read_a_step'] / 2**20:.0f} MiB",
            ]
        )
    return table(["cache and budget", "decode step", "of full", "resident", "outside", "read in a step"], rows)


def demo() -> str:
    """What ``mixkv demo`` printed."""
    rows = []
    for run in json.loads((RESULTS / "demo_smollm2.json").read_text(encoding="utf-8"))["runs"]:
        name = "full" if run["method"] == "full" else f"`{run['method']}`, `{run['score']}`, {run['budget']}"
        size = f"{run['bytes'] / 2**20:.1f} MiB"
        rows.append(
            [name, size, f"{run['bytes_ratio']:.0%}", f"{run['step_ratio']:.2f}", f"{run['mean_kl']:.3f}", run["answer"]]
        )
    return table(["cache", "memory", "of full", "decode step, of full", "KL", "answer"], rows)


def options() -> str:
    """Every option of MixKVConfig with its default."""
    return table(["option", "default"], ([f"`{field.name}`", f"`{_default(field.name)}`"] for field in _fields()))


def quality() -> str:
    """Change of KL on texts, the defaults against snapkv with mix, with its confidence interval."""
    rows = []
    for name in ("eval_smollm2", "eval_gemma3_270m"):
        header, found = _summary(name, (("snapkv", "mix"), ("global", "mix-output")))
        for budget in (64, 128, 256):
            cells = []
            for task in _TEXT_TASKS:
                row = found["global", budget, task]
                text = f"{row['kl_change']:+.0%} [{row['kl_low']:+.0%}, {row['kl_high']:+.0%}]"
                cells.append(f"**{text}**" if row["kl_low"] > 0 or row["kl_high"] < 0 else text)
            rows.append([header["model"].split("/")[-1], str(budget), *cells])
    return table(["model", "budget", *_TEXT_TASKS], rows)


def texts() -> str:
    """Right answers of the full cache that stay right on texts, at three budgets."""
    caches = (("snapkv", "attn"), ("snapkv", "mix"), ("adakv", "mix"), ("adakv", "mix-output"), ("global", "mix-output"))
    tasks = [task for task in _TEXT_TASKS if task != "prose"]
    rows, totals = [], {}
    for method, score in caches:
        _, found = _summary("eval_smollm2", (("snapkv", "mix"), (method, score)))
        of = {task: [found[method, budget, task] for budget in (64, 128, 256)] for task in tasks}
        totals |= {task: of[task][0]["answered"] for task in tasks}
        rows.append([f"`{method}`, `{score}`", *(" / ".join(str(row["kept"]) for row in of[task]) for task in tasks)])
    return table(["cache", *(f"{task} (of {totals[task]})" for task in tasks)], rows)


TABLES = {
    function.__name__: function
    for function in (readme, methods, scores, formats, budgets, later, once, speed, hybrid, demo, options, quality, texts)
}


def up_to_date(text: str) -> str:
    """``text`` with its tables made anew."""
    return _MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def files() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@cache
def _read(name: str) -> tuple[dict, list[dict]]:
    return journal.read(str(RESULTS / f"{name}.jsonl"))


@cache
def _bench(method: str, tokens: int) -> dict:
    runs = json.loads((RESULTS / "bench_smollm2_cpu.json").read_text(encoding="utf-8"))["runs"]
    return next(run for run in runs if run["method"] == method and run["prompt_tokens"] == tokens)


@cache
def _answers(name: str, task: str, cache: tuple[str, str] | None, budget: int | float) -> tuple[int, int, float]:
    """Right answers of the full cache, those that stay right, and the mean resident share. ``cache`` None: the full one."""
    header, records = _read(name)
    found = [record for record in records if record["task"] == task]
    answered = sum(record["answered"] for record in found)
    if cache is None:
        return answered, answered, 1.0
    kinds = [(config["method"], config["score"], config["budget"]) for config in header["configs"]]
    results = [record["results"][kinds.index((*cache, budget))] for record in found]
    resident = sum(result.get("resident", 0.0) for result in results) / len(results)
    return answered, sum(result["kept"] for result in results), resident


_ONCE_TASKS = {
    "texts": "several",
    "forms": "form-later",
    "receipts": "receipt-later",
    "screens": "screen-later",
    "two pages": "two-pages-later",
}


def _once_records(task: str) -> list[dict]:
    """The samples of a task that `mixkv.read` was evaluated on."""
    _, records = _read("eval_once_texts" if task == "several" else "eval_once_pages")
    return [record for record in records if record["task"] == task]


def _once_answered(task: str) -> int:
    return sum(record["answered"] for record in _once_records(task))


def _once_results(name: str, task: str, given: dict) -> list[dict]:
    """Results of the config that has ``given``, for the samples of `_once_records`, in order."""
    header, records = _read(name)
    index = next(i for i, config in enumerate(header["configs"]) if given.items() <= config.items())
    found = {record["seed"]: record["results"][index] for record in records if record["task"] == task}
    return [found[record["seed"]] for record in _once_records(task)]


def _once(names: tuple[str, str], given: dict) -> list[str]:
    """Bytes resident, KL on texts beside that of ``generate``'s default at 13.5 %, and answers that stay right."""
    # As `mixkv.read` does: values are refitted for texts.
    texts = _once_results(names[0], "several", given | ({"refit": True} if "rows" in given else {}))
    usual = _once_results("eval_retrieval", "several", {"method": "global", "score": "mix-output", "budget": 0.135})
    kl = [[part["kl"] for part in results] for results in (texts, usual)]
    change, low, high = paired.relative_change(*kl)
    cells = [f"{sum(part['resident'] for part in texts) / len(texts):.1%}"]
    cells.append(f"{sum(kl[0]) / len(texts):.3f}" + (f" ({change:+.0%} [{low:+.0%}, {high:+.0%}])" if kl[0] != kl[1] else ""))
    cells.append(str(sum(part["kept"] for part in texts)))
    for task in list(_ONCE_TASKS.values())[1:]:
        results = _once_results(names[1], task, given | ({"refit": False} if "rows" in given else {}))
        cells.append(str(sum(part["kept"] for part in results)))
    return cells


def _share(task: str, cache: tuple[str, str] | None, budget: int | float, names: tuple[str, ...]) -> float:
    """Of all questions of a task, those answered right."""
    for name in names:
        header, records = _read(name)
        kinds = [(config["method"], config["score"], config["budget"]) for config in header["configs"]]
        if cache is None or (*cache, budget) in kinds:
            asked = sum(record["task"] == task for record in records) * (pages.LATER_QUESTIONS if "later" in task else 1)
            return _answers(name, task, cache, budget)[1] / asked
    raise KeyError(f"no results for {cache} with budget {budget} in {', '.join(names)}")


_PAGES = ("eval_pages", "eval_pages_layers")
_TEXT_TASKS = ("codes", "lookup", "needle", "prose", "several")


@cache
def _summary(name: str, caches: tuple[tuple[str, str], ...]) -> tuple[dict, dict]:
    """The header, and `paired.summary` by method, budget and task, over the seeds of which every task is there."""
    header, records = _read(name)
    seeds = Counter(record["seed"] for record in records)
    tasks = {record["task"] for record in records}
    wanted = [index for index, config in enumerate(header["configs"]) if (config["method"], config["score"]) in caches]
    configs = [header["configs"][index] for index in wanted]
    whole = [
        record | {"results": [record["results"][index] for index in wanted]}
        for record in records
        if seeds[record["seed"]] == len(tasks)
    ]
    rows = paired.summary(whole, configs, caches[0])
    return header, {
        (row["method"], row["budget"], row["task"]): row for row in rows if (row["method"], row["score"]) == caches[-1]
    }


def _percent(task: str, cache: tuple[str, str] | None, budget: int | float, names: tuple[str, ...] = _PAGES) -> str:
    return f"{_share(task, cache, budget, names):.0%}"


def _mean_percent(cache: tuple[str, str] | None, budget: int, names: tuple[str, ...] = _PAGES) -> str:
    return f"{sum(_share(kind, cache, budget, names) for kind in KINDS) / len(KINDS):.0%}"


def _fields() -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(MixKVConfig)


def _default(name: str):
    default = getattr(MixKVConfig, name)
    return round(default, 3) if isinstance(default, float) else default


def _paper(number: str | None) -> str:
    return "" if number is None else f"[{number}](https://arxiv.org/abs/{number})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=TABLES)
    parser.add_argument("--write", action="store_true", help="bring README.md and docs/ up to date")
    given = parser.parse_args()
    if given.name:
        print(TABLES[given.name]())
    for path in files() if given.write else ():
        text = path.read_text(encoding="utf-8")
        if up_to_date(text) != text:
            path.write_text(up_to_date(text), encoding="utf-8")
            print(f"{path.relative_to(ROOT)} changed")


if __name__ == "__main__":
    main()
