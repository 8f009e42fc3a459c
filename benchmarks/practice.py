"""One store of demonstrations, one policy, its evaluation and optionally fine-tuning: the resumable runs of the
benchmarks of Meta-World and of fine-tuning on robosuite and with the Adroit hand, and their reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from earlier import with_earlier
from imitation import ROOT, columns_of, run_script

from flowpolicy.evaluation.statistics import paired_difference_interval, wilson_interval
from flowpolicy.files.reading import read_json
from flowpolicy.runs.loggers import read_metrics

# ReinFlow where success is the only reward: short iterations, each learnt from at length.
SUCCESS_ALONE = (
    "reinflow.n_steps=50", "reinflow.batch_size=200", "reinflow.n_epochs=8", "reinflow.target_kl=0.3",
    "reinflow.critic_warmup=2",
)  # fmt: skip
# EXPO there: edits may be large, and are explored.
LARGE_EDITS = (
    "algorithm.bound=0.3", "algorithm.entropy=0", "algorithm.target_proposals=2", "offpolicy.utd=2",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One store of demonstrations, one policy, and where ``practice`` is not empty what fine-tuning makes of it.

    ``script`` is that of fine-tuning; an off-policy one has the demonstrations in its batches.
    """

    root: Path
    name: str
    env: tuple[str, ...]  # what the scripts have in common
    collecting: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    practice: tuple[str, ...] = ()
    episodes: int = 100
    seed: int = 0
    num_envs: int = 20  # of the evaluation
    script: str = "finetune_reinflow"

    @property
    def folder(self) -> Path:
        return self.root / self.name


def carry_out(run: Run, threads: int, workers: int = 2) -> None:
    """Do what is missing of one run; each script writes its summary last."""
    collected, trained, evaluated, practised = (
        run.folder / part for part in ("collect", "train", "evaluate", "practise")
    )
    store = collected / "demonstrations.zarr.zip"
    if not (collected / "summary.json").exists():
        _script(
            "collect_demos", *run.env, *run.collecting, f"workers={workers}", _path("out", store), collected
        )
    if not (trained / "summary.json").exists():
        options = ("policy=flow_matching", *run.training, f"seed={run.seed}", f"train.threads={threads}")
        options += ("train.final_episodes=0", "video=false", "resume=true", _path("data.path", store))
        _script("pretrain", *run.env, *options, trained)
    if not (evaluated / "summary.json").exists():
        options = (f"episodes={run.episodes}", f"num_envs={run.num_envs}", f"threads={threads}", "video=1")
        _script("evaluate", *run.env, *options, _path("checkpoint", trained / "checkpoint"), evaluated)
    if run.practice and not (practised / "summary.json").exists():
        options = (*run.practice, f"seed={run.seed}", f"threads={threads}", "resume=true")
        if run.script == "finetune_offpolicy":
            options += (_path("demonstrations", store),)
        _script(run.script, *run.env, *options, _path("checkpoint", trained / "checkpoint"), practised)


UNSEEN = "seed=2000000"
"""First seed of episodes that no choice of a setting has seen."""


def evaluate_unseen(run: Run, threads: int, episodes: int = 100) -> None:
    """Evaluate the policy before and after fine-tuning on unseen seeds, at the K that it was tuned for."""
    num_steps = read_json(run.folder / "practise" / "summary.json")["num_steps"]
    for when, trained in (("before", "train"), ("after", "practise")):
        folder = run.folder / f"unseen-{when}"
        if not (folder / "summary.json").exists():
            options = (f"num_steps={num_steps}", f"episodes={episodes}", f"num_envs={run.num_envs}")
            options += (f"threads={threads}", UNSEEN, "video=0")
            _script(
                "evaluate",
                *run.env,
                *options,
                _path("checkpoint", run.folder / trained / "checkpoint"),
                folder,
            )


def unseen(run: Run) -> dict[str, Any] | None:
    """What :func:`evaluate_unseen` found; None where it did not."""
    folders = [run.folder / f"unseen-{when}" for when in ("before", "after")]
    if not all((folder / "summary.json").exists() for folder in folders):
        return None
    summaries = [read_json(folder / "summary.json") for folder in folders]
    success = [
        columns_of(folder / f"episodes_K{summary['metrics']['num_steps']}.csv")["success"]
        for folder, summary in zip(folders, summaries, strict=True)
    ]
    before, after = success
    return {
        "run": run.name,
        "episodes": len(before),
        "before": before.mean(),
        "before_ci95": list(wilson_interval(int(before.sum()), len(before))),
        "after": after.mean(),
        "after_ci95": list(wilson_interval(int(after.sum()), len(after))),
        "gain": after.mean() - before.mean(),
        "gain_ci95": list(paired_difference_interval(after, before)),
        "commands": [summary["command"] for summary in summaries],
    }


def _path(key: str, path: Path) -> str:
    return f"{key}={path.relative_to(ROOT)}"


def _script(name: str, *options: str | Path) -> None:
    run_script(
        name, *(_path("run_dir", option) if isinstance(option, Path) else option for option in options)
    )


def report(name: str, suite: str, runs: list[Run], command: str) -> dict[str, Any]:
    """A row per run: success with Wilson's interval, by task where one policy plays several; and the rows of the results
    ``name`` whose runs are not here."""
    rows, meta, missing = [], {}, []
    for run in runs:
        last = run.folder / ("practise" if run.practice else "evaluate") / "summary.json"
        if not last.exists():
            missing.append(run.name)
            continue
        meta = {key: read_json(last)[key] for key in ("versions", "machine", "date")}
        rows.append(_row(run))
    content = {
        "suite": suite,
        "complete": not missing,
        "missing": missing,
        "command": command,
        "intervals_over": "episodes",
        **meta,
        "rows": rows,
    }
    content = with_earlier(name, content, lambda row: [row["run"]], [run.name for run in runs])
    begun = [_begun(run) for run in runs if run.name in missing and _curve(run)["step"]]
    if begun:
        content["begun"] = begun
    alone = [row for row in content["rows"] if row["by_task"] is None and "tuned_success" not in row]
    if len(alone) > 1:
        hits, count = (sum(row[key] for row in alone) for key in ("successes", "episodes"))
        content["mean_success_single_task"] = hits / count
        content["mean_success_single_task_ci95"] = list(wilson_interval(hits, count))
    return content


def _row(run: Run) -> dict[str, Any]:
    collected, trained, evaluated = (
        read_json(run.folder / part / "summary.json") for part in ("collect", "train", "evaluate")
    )
    metrics = evaluated["metrics"]
    row: dict[str, Any] = {
        "run": run.name,
        "policy": trained["policy"],
        "parameters": trained["parameters"],
        "demonstrations": collected["metrics"]["episodes"],
        "train_steps": trained["steps"],
        "train_seconds": trained["metrics"]["train_seconds"],
        "seed": run.seed,
        "num_steps": metrics["num_steps"],
        "ms_per_chunk": metrics["ms_per_chunk"],
        "episodes": metrics["episodes"],
        "successes": round(metrics["success_rate"] * metrics["episodes"]),
        "success_rate": metrics["success_rate"],
        "success_ci95": metrics["success_ci95"],
        "length_mean": metrics["length_mean"],
        "by_task": metrics["by_task"],
        "git_commit": evaluated["git_commit"],
        "commands": [summary["command"] for summary in (collected, trained, evaluated)],
    }
    if metrics["by_task"] is not None:
        row["success_mean_of_tasks"] = float(
            np.mean([found["success_rate"] for found in metrics["by_task"].values()])
        )
    if run.practice:
        row |= _practised(run)
    return row


def _practised(run: Run) -> dict[str, Any]:
    summary = read_json(run.folder / "practise" / "summary.json")
    found = summary["metrics"]
    return {
        "practice_steps": summary["steps"],
        "practice_seconds": summary["wall_seconds"],
        "base_success": found["base"]["success_rate"],
        "base_success_ci95": found["base"]["success_ci95"],
        "tuned_success": found["tuned"]["success_rate"],
        "tuned_success_ci95": found["tuned"]["success_ci95"],
        "success_gain": found["success_gain"],
        "success_gain_ci95": found["success_gain_ci95"],
        "practice_command": summary["command"],
        "curve": _curve(run),
    }


def _begun(run: Run) -> dict[str, Any]:
    """How far fine-tuning has come that has not ended: the evaluations on the way."""
    evaluated = read_json(run.folder / "evaluate" / "summary.json")
    base = {key: evaluated["metrics"][key] for key in ("success_rate", "success_ci95", "episodes")}
    return {"run": run.name, "complete": False, "base": base, "practice": run.practice, "curve": _curve(run)}


def _curve(run: Run) -> dict[str, list[float]]:
    file = run.folder / "practise" / "metrics.csv"
    rows = [row for row in read_metrics(file) if "evaluation/success" in row] if file.exists() else []
    return {key: [row[key] for row in rows] for key in ("step", "evaluation/success")}


def table(content: dict[str, Any]) -> str:
    """Markdown, a line per run and, where one policy plays several tasks, per task."""
    lines = ["| run | demonstrations | success | episodes | after fine-tuning | gain |", "|" + " --- |" * 6]
    for row in content["rows"]:
        tuned = gain = ""
        if "tuned_success" in row:
            tuned = _rate(row["tuned_success"], row["tuned_success_ci95"])
            gain = _rate(row["success_gain"], row["success_gain_ci95"])
        rate = _rate(row["success_rate"], row["success_ci95"])
        lines.append(
            f"| {row['run']} | {row['demonstrations']} | {rate} | {row['episodes']} | {tuned} | {gain} |"
        )
        for name, found in (row["by_task"] or {}).items():
            rate = _rate(found["success_rate"], found["success_ci95"])
            lines.append(f"| {row['run']}: {name} | | {rate} | {found['episodes']} | | |")
    for begun in content.get("begun", ()):
        steps, success = (begun["curve"][key][-1] for key in ("step", "evaluation/success"))
        base = _rate(begun["base"]["success_rate"], begun["base"]["success_ci95"])
        count = begun["base"]["episodes"]
        lines.append(f"| {begun['run']} | | {base} | {count} | {success:.2f} so far, {steps:.0f} steps | |")
    if "mean_success_single_task" in content:
        rate = _rate(content["mean_success_single_task"], content["mean_success_single_task_ci95"])
        lines.append(f"| mean of one policy a task | | {rate} | | | |")
    return "\n".join(lines)


def _rate(value: float, interval: list[float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
