"""Every way of learning from reward side by side: each run of the comparing suites, and aggregates over tasks and seeds.

    python benchmarks/reward_learning.py

Collects what `finetuning.py hopper-rules`, `walker2d-rules`, `adroit_door-offpolicy`, `adroit_door-rules` and
`drawer_open-rules` have written; runs nothing. A score is 0 at the pretrained policy and 1 at the reference: the published
return on Hopper and Walker2d (Zhang et al. 2025, shortcut), every episode a success on the others. Interquartile means and
intervals are rliable's (Agarwal et al. 2021), stratified by task; `pip install "flowpolicy[benchmarks]"`. Of four numbers the
interquartile mean leaves out the best and the worst, so the mean and the worst stand beside it. Results go to
benchmarks/results/reward-learning.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from finetuning import PUBLISHED, RESULTS
from rliable import library, metrics

from flowpolicy.evaluation.statistics import success_interval_by_seed
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json

SUITES = {
    "hopper": ("hopper-rules",),
    "walker2d": ("walker2d-rules",),
    "adroit_door": ("adroit_door-offpolicy", "adroit_door-rules"),
    "drawer_open": ("drawer_open-rules",),
}
REFERENCES = {task: PUBLISHED[task]["shortcut"][1] for task in ("hopper", "walker2d")}
WAYS = {"reinflow-0.2M": "ppo"}  # rows under the name that they have elsewhere
RESAMPLES = 5_000


def runs_of(task: str) -> Iterator[dict[str, Any]]:
    """Rows of the task's suites, one for each way."""
    for suite in SUITES[task]:
        file = RESULTS / f"finetuning-{suite}.json"
        yield from read_json(file)["rows"] if file.exists() else ()


def row_of(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A way on a task: where it was on the way and at the end, and its score by seed."""
    is_success = task not in REFERENCES
    name = "evaluation/success" if is_success else "evaluation/return"
    base = float(np.mean(row["base_success"])) if is_success else row["base_return"]
    by_seed = row["success_by_seed"] if is_success else row["return_by_seed"]
    reference, (mean, interval) = REFERENCES.get(task, 1.0), ending(row)
    curves = [dict(zip(curve["step"], curve[name], strict=True)) for curve in row["curves"]]
    marks = sorted({round(step, -5) for curve in curves for step in curve if step >= 1e5})
    on_the_way = {
        f"{mark:.0f}": [min(curve.items(), key=lambda item: abs(item[0] - mark))[1] for curve in curves]
        for mark in marks
    }
    return {
        "task": task, "way": WAYS.get(row["label"], row["label"]), "base": base, "by_seed": by_seed, "seeds": row["seeds"],
        "mean": mean, "ci95": interval,
        "score_by_seed": [(value - base) / (reference - base) for value in by_seed],
        "on_the_way": on_the_way, "num_steps": row["num_steps"], "steps": row["steps"],
        "updates": row["updates"], "minutes": [sum(each.values()) / 60 for each in row["seconds"]],
    }  # fmt: skip


def aggregates(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Interquartile means of the ways that were taken on all of some tasks: each that has several seeds, with 95% intervals
    over them; and all together, from the first seed of each."""
    seeds = {task: [len(row["by_seed"]) for row in rows if row["task"] == task] for task in SUITES}
    several = [task for task, counts in seeds.items() if min(counts, default=0) > 1]
    groups = {task: ([task], None) for task in several} | {"all, one seed": (list(SUITES), 1)}
    return {
        name: aggregate([row for row in rows if row["task"] in tasks], tasks, count)
        for name, (tasks, count) in groups.items()
    }


def aggregate(rows: list[dict[str, Any]], tasks: list[str], seeds: int | None) -> dict[str, Any]:
    """The ways that have a row of each of the ``tasks``, best first."""
    scores: dict[str, np.ndarray] = {}
    for way in {row["way"] for row in rows}:
        mine = [row["score_by_seed"][:seeds] for row in rows if row["way"] == way]
        if len(mine) == len(tasks):
            scores[way] = np.array(mine).T  # (seeds, tasks)
    if not scores:
        return {}
    means, intervals = library.get_interval_estimates(
        scores, lambda values: np.array([metrics.aggregate_iqm(values)]), reps=RESAMPLES,
        random_state=np.random.RandomState(0),
    )  # fmt: skip
    return {
        way: {
            "interquartile_mean": float(means[way][0]),
            "ci95": intervals[way][:, 0].tolist() if len(scores[way]) > 1 else None,
            "mean": float(metrics.aggregate_mean(scores[way])),
            "worst": float(scores[way].mean(0).min()),  # of the tasks
            "seeds": len(scores[way]),
        }
        for way in sorted(scores, key=lambda way: -means[way][0])
    }


def ending(row: dict[str, Any]) -> tuple[float, list[float]]:
    """What a way ends at, and its 95% interval: over seeds where there are several, over episodes elsewhere."""
    if "success_by_seed" not in row:
        return row["return_mean"], row["return_ci95"]
    rates = row["success_by_seed"]
    episodes = row["episodes"] // len(rates)
    hits = [round(rate * episodes) for rate in rates]
    interval = success_interval_by_seed([[1] * hit + [0] * (episodes - hit) for hit in hits])
    return float(np.mean(rates)), list(interval)


def cells(rows: list[dict[str, Any]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """By way, the cells of the two tables: where it comes to on each task, and what that takes."""
    by_way = {
        way: {row["task"]: row for row in rows if row["way"] == way} for way in {row["way"] for row in rows}
    }
    ends: dict[str, list[str]] = {}
    costs: dict[str, list[str]] = {}
    for way, found in by_way.items():
        early = found["hopper"]["on_the_way"]["100000"] if "hopper" in found else []
        ends[way] = [", ".join(f"{value:.0f}" for value in early)]
        costs[way] = []
        for task in SUITES:
            row = found.get(task)
            ends[way].append(numbers(task, row["mean"], row["ci95"]) if row else "")
            costs[way].append(f"{np.mean(row['updates']):,.0f} in {span(row['minutes'])} min" if row else "")
    return ends, costs


def numbers(task: str, mean: float, interval: list[float] | None = None) -> str:
    """A return or a success rate, as "3302 [3233, 3371]" or "0.92 [0.85, 0.96]"."""
    digits = 0 if task in REFERENCES else 2
    ends = [] if interval is None else [f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"]
    return " ".join([f"{mean:.{digits}f}", *ends])


def span(minutes: list[float]) -> str:
    """The least and the most, as "2 to 4"."""
    least, most = round(min(minutes)), round(max(minutes))
    return f"{least}" if least == most else f"{least} to {most}"


def print_table(head: list[str], cells: dict[str, list[str]], order: list[str]) -> None:
    print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
    for way in order:
        print(f"| `{way}` | " + " | ".join(cells[way]) + " |")


def main() -> None:
    rows = [row_of(task, row) for task in SUITES for row in runs_of(task)]
    found = aggregates(rows)
    write_json(RESULTS / "reward-learning.json", {
        "command": "python benchmarks/reward_learning.py", "references": REFERENCES, "rows": rows,
        "aggregates": found,
    })  # fmt: skip
    ends, costs = cells(rows)
    overall = found["all, one seed"]
    order = sorted(ends, key=lambda way: -overall[way]["mean"] if way in overall else np.inf)
    scores = {
        way: [
            f"{overall[way][kind]:.2f}" if way in overall else ""
            for kind in ("mean", "interquartile_mean", "worst")
        ]
        for way in ends
    }
    bases = {task: next(row["base"] for row in rows if row["task"] == task) for task in SUITES}
    tasks = [f"{task}, from {numbers(task, base)}" for task, base in bases.items()]
    head = ["way", "hopper, 0.1 M", *tasks, "mean score", "interquartile mean", "worst"]
    print_table(head, {way: ends[way] + scores[way] for way in ends}, order)
    print()
    print_table(["updates in minutes", *SUITES], costs, order)
    for name, ways in found.items():
        print(name)
        for way, each in ways.items():
            interval = "" if each["ci95"] is None else " [{:.2f}, {:.2f}]".format(*each["ci95"])
            print(
                f"  {way}: interquartile mean {each['interquartile_mean']:.2f}{interval}, mean {each['mean']:.2f}"
            )


if __name__ == "__main__":
    main()
