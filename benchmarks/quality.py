"""Tables and the figure of research/, from the samples that `mixkv eval --out` wrote.

python benchmarks/quality.py benchmarks/results/eval_smollm2.jsonl [more.jsonl] [--figure docs/figures/quality.svg]

Files of the same model and options, whose samples were read by different caches, make one table.
"""

from __future__ import annotations

import argparse
from collections import Counter

from mixkv import registry
from mixkv.evaluation import journal, pages, paired

Cache = tuple[str, str]


def whole_rounds(records: list[dict]) -> list[dict]:
    """The records of seeds for which every task has a sample, so that all tasks have the same number of samples."""
    tasks = {record["task"] for record in records}
    seeds = Counter(record["seed"] for record in records)
    return [record for record in records if seeds[record["seed"]] == len(tasks)]


def merged(runs: list[tuple[dict, list[dict]]]) -> tuple[list[dict], list[dict]]:
    """Configs and records of several runs on the same samples, in the order of the runs, without duplicates."""
    configs, records = list(runs[0][0]["configs"]), {journal.name(record): record for record in runs[0][1]}
    for header, more in runs[1:]:
        new = [index for index, config in enumerate(header["configs"]) if kind(config) not in map(kind, configs)]
        configs += [header["configs"][index] for index in new]
        found = {journal.name(record): record["results"] for record in more}
        records = {
            name: record | {"results": record["results"] + [found[name][index] for index in new]}
            for name, record in records.items()
            if name in found
        }
    return configs, list(records.values())


def kind(config: dict) -> tuple:
    return config["method"], config["score"] + paired.form(config), config["budget"]


def cell(row: dict) -> str:
    """Change of KL with its interval."""
    return with_interval(row["kl_change"], row["kl_low"], row["kl_high"])


def with_interval(middle: float, low: float, high: float) -> str:
    """A relative change with its interval; bold if the interval does not contain 0."""
    return marked(f"{middle:+.0%} [{low:+.0%}, {high:+.0%}]", low, high)


def marked(text: str, low: float, high: float) -> str:
    return f"**{text}**" if low > 0 or high < 0 else text


def by_budget(rows: list[dict]) -> dict[int | float, dict[tuple[str, str, str], dict]]:
    """Budget to (method, score, task) to row."""
    found = {}
    for row in rows:
        found.setdefault(row["budget"], {})[row["method"], row["score"], row["task"]] = row
    return found


def print_head(titles: list[str]) -> None:
    print("| cache | " + " | ".join(titles) + " |\n" + "|---" * (len(titles) + 1) + "|")


def print_tables(name: str, rows: list[dict], reference: Cache, answers_only: bool) -> None:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    caches = list(dict.fromkeys((row["method"], row["score"]) for row in rows))
    found = by_budget(rows)
    for budget, by in () if answers_only else found.items():
        print(f"\n{name}, budget {budget}, {next(iter(by.values()))['samples']} samples a task\n")
        print_head(tasks)
        print(f"| {' '.join(reference)}: KL | " + " | ".join(f"{by[(*reference, task)]['kl']:.3f}" for task in tasks) + " |")
        for cache in caches:
            if cache != reference:
                print(f"| {' '.join(cache)} | " + " | ".join(cell(by[(*cache, task)]) for task in tasks) + " |")
    if all(task in pages.TASKS for task in tasks):
        print_exact(name, rows, reference)
        return
    asked = [task for task in tasks if any(row["task"] == task and row["kept"] is not None for row in rows)]
    print(f"\n{name}: right answers of the full cache that stay right, at budgets {' / '.join(map(str, found))}\n")
    totals = [f"{task} (of {next(iter(found.values()))[(*caches[0], task)]['answered']})" for task in asked]
    print_head(totals)
    for cache in caches:
        kept = [" / ".join(str(by[(*cache, task)]["kept"]) for by in found.values()) for task in asked]
        print(f"| {' '.join(cache)} | " + " | ".join(kept) + " |")


def print_equal(name: str, rows: list[dict], reference: Cache, method: str) -> None:
    """Prints the caches of ``method`` compared with the reference with at least as many resident bytes."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    mine = [row for row in rows if row["method"] == method and row["kl_change"] is not None]
    print(
        f"\n{name}: {method} against {' '.join(reference)} with as many bytes resident, {mine[0]['samples']} samples a task\n"
    )
    print_head(["resident, %", *(f"{task}: KL, change" for task in tasks), *(f"{task}: right, change" for task in tasks)])
    for found in dict.fromkeys((row["score"], row["budget"]) for row in mine):
        by = {row["task"]: row for row in mine if (row["score"], row["budget"]) == found}
        resident = " ".join(f"{100 * by[task]['resident']:.1f}" for task in tasks)
        changes = [f"{by[task]['kl']:.3f}, {cell(by[task])}" for task in tasks]
        for row in map(by.get, tasks):
            scale = 100 * row["samples"] / max(row["answered"] or 0, 1)
            change, low, high = (scale * (row[f"kept_{part}"] or 0.0) for part in ("change", "low", "high"))
            changes.append(
                f"{row['kept']} of {row['answered']}, {marked(f'{change:+.0f} [{low:+.0f}, {high:+.0f}]', low, high)}"
            )
        print(f"| {method} {found[0]} {found[1]} | " + " | ".join([resident, *changes]) + " |")


def questions(row: dict) -> int:
    """The number of questions about pages; there are several about a page that is compressed before its questions."""
    return row["samples"] * (pages.LATER_QUESTIONS if "later" in row["task"] else 1)


def print_exact(name: str, rows: list[dict], reference: Cache) -> None:
    """Prints the share of questions about pages that are answered exactly, and the paired difference to the reference in points."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    caches = list(dict.fromkeys((row["method"], row["score"]) for row in rows))
    for budget, by in by_budget(rows).items():
        print(f"\n{name}, budget {budget}: answered exactly, % (difference to {' '.join(reference)} in points)\n")
        print_head(tasks)
        full = [100 * row["answered"] / questions(row) for row in (by[(*caches[0], task)] for task in tasks)]
        print("| full cache | " + " | ".join(f"{share:.0f}" for share in full) + " |")
        for cache in caches:
            cells = []
            for task in tasks:
                row = by[(*cache, task)]
                text = f"{100 * row['kept'] / questions(row):.0f}"
                if cache != reference:
                    scale = 100 * row["samples"] / questions(row)
                    change, low, high = (scale * row[f"kept_{part}"] for part in ("change", "low", "high"))
                    text += f" ({marked(f'{change:+.0f} [{low:+.0f}, {high:+.0f}]', low, high)})"
                cells.append(text)
            print(f"| {' '.join(cache)} | " + " | ".join(cells) + " |")


def draw(models: dict[str, list[dict]], path: str) -> None:
    """Draws the mean over tasks of KL, or of exact answers for pages, against the budget: a line per cache, a panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    caches = sorted({(row["method"], row["score"]) for rows in models.values() for row in rows})
    # A colour for each method, the same in all pictures, and a line style for each score.
    colours = {name: f"C{index}" for index, name in enumerate(registry.METHODS)}
    styles = {"mix-output": "-", "mix": "--", "attn": ":"}
    figure, axes = plt.subplots(1, len(models), figsize=(2 + 4.5 * len(models), 3.6), squeeze=False, layout="constrained")
    for ax, (name, rows) in zip(axes[0], models.items()):
        exact = all(row["task"] in pages.TASKS for row in rows)
        for method, score in caches:
            mine = [row for row in rows if (row["method"], row["score"]) == (method, score)]
            budgets = sorted({row["budget"] for row in mine})
            means = [
                [row["kept"] / questions(row) if exact else row["kl"] for row in mine if row["budget"] == budget]
                for budget in budgets
            ]
            look = {"color": colours[method], "linestyle": styles.get(score, "-."), "marker": "o", "markersize": 3}
            ax.plot(budgets, [sum(part) / len(part) for part in means], label=f"{method} {score}", **look)
        label = "answered exactly, mean over tasks" if exact else "KL to the full cache, mean over tasks"
        ax.set(title=name, xlabel="budget (entries per KV head)", ylabel=label, xscale="log", ylim=(0, None))
        budgets = sorted({row["budget"] for row in rows})
        ax.set_xticks(budgets, map(str, budgets))
        ax.minorticks_off()
    handles = {name: handle for ax in axes[0] for handle, name in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8)
    plt.rcParams["svg.hashsalt"] = "mixkv"
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--figure", metavar="FILE")
    parser.add_argument("--reference", default="snapkv+mix", metavar="METHOD+SCORE", help="default %(default)s")
    parser.add_argument("--answers", action="store_true", help="only the tables of right answers")
    parser.add_argument("--equal-bytes", metavar="METHOD", help="only this method, against the reference with as many bytes")
    given = parser.parse_args()
    reference = tuple(given.reference.split("+"))
    runs = {}
    for path in given.files:
        header, records = journal.read(path)
        name = header["model"].rstrip("/").split("/")[-1]
        if header.get("variant", "fresh") != "fresh":
            name += f", {header['variant']} not shown in training"
        if "keys" in header:
            name += f", {' or '.join(map(str, header['keys']))} keys a question"
        runs.setdefault((name, header["answer_tokens"]), []).append((header, records))
    models = {}
    for (name, _), found in runs.items():
        configs, records = merged(found)
        records, equal = whole_rounds(records), given.equal_bytes
        models[name] = [
            {**row, "score": row["score"] + row["form"]}
            for row in paired.summary(records, configs, reference, equal_bytes=equal is not None)
        ]
        if equal is None:
            print_tables(name, models[name], reference, given.answers)
        else:
            print_equal(name, models[name], reference, equal)
    if given.figure:
        draw(models, given.figure)


if __name__ == "__main__":
    main()
