"""Fine-tune the committed flow-matching policies by preferences, resumably, into one table.

    python benchmarks/preferences.py hopper            # plays, trains and evaluates what is missing, writes the JSON
    python benchmarks/preferences.py pusht --report    # only collects what is there

Pairs are made and policies trained by the real scripts; the command of each training is in its row. A seed has pairs of
its own. Policies are compared with their base on 400 episodes with the same starts and the same noise. On Hopper the
more upright of two segments is preferred, and what is shown first is the negative mean lean of the torso in radians. Results
go to benchmarks/results/preferences-<task>.json; one whose runs are not all there says so.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from earlier import with_earlier
from imitation import ROOT, columns_of, publish, run_script
from preference_labels import ANGLE

from flowpolicy import FlowPolicy
from flowpolicy.evaluation.rollout import evaluate
from flowpolicy.evaluation.statistics import mean_interval_by_seed, paired_difference_interval
from flowpolicy.evaluation.summary import machine, versions
from flowpolicy.evaluation.task import Task, task_of

RUNS = Path("runs/benchmarks/preferences")  # below the root, as scripts are given it
EPISODES = 400
SEEDS = (0, 1, 2)
FUNCTIONS = "benchmarks.preference_labels"


@dataclass(frozen=True)
class Way:
    """One way to learn from a store of pairs.

    Attributes:
        label: of the folder and the table.
        options: for training.
    """

    label: str
    options: tuple[str, ...]


PAIRS = {
    "hopper": ("pairs=300", "latest_start=300"),
    "pusht": ("pairs=2000", "latest_start=200", "segment_steps=64"),
}
WAYS = {
    "hopper": (
        Way("dpo", (f"label={FUNCTIONS}:upright",)),
        Way("rwr", (f"label={FUNCTIONS}:upright", "loss=flow_rwr")),
    ),
    "pusht": (
        Way("dpo-return", ("label=return",)),
        Way("rwr-return", ("label=return", "loss=flow_rwr")),
        # An episode ends where the block is in place, so that of two segments the successful one may return less.
        Way("dpo-without-pull", ("label=return", "loss.pull=0")),
        Way("dpo-held", (f"label={FUNCTIONS}:held_return",)),
        Way("rwr-held", (f"label={FUNCTIONS}:held_return", "loss=flow_rwr")),
    ),
}


class Watched(gymnasium.Wrapper):
    """Hopper, whose score is the negative mean lean of its torso."""

    def reset(self, **kwargs: Any) -> Any:
        observation, info = self.env.reset(**kwargs)
        self._lean = [abs(observation["observation"][ANGLE])]
        return observation, info

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info = {**info, "score": -np.mean(self._lean)}
        self._lean.append(abs(observation["observation"][ANGLE]))
        return observation, reward, terminated, truncated, info


class WatchedTask(Task):
    """The task of it."""

    def make(self, **kwargs: Any) -> Any:
        return Watched(super().make(**kwargs))


def base(task: str) -> str:
    """The committed policy."""
    return f"benchmarks/checkpoints/{task}-flow_matching-seed0"


def evaluated(task: str, checkpoint: Path | str, file: Path) -> None:
    """Write the columns of the episodes unless they are there."""
    if (ROOT / file).exists():
        return
    policy = FlowPolicy.load(ROOT / checkpoint)
    made = task_of(policy.spec.task, None, checkpoint)
    if task == "hopper":
        made = WatchedTask(**{item.name: getattr(made, item.name) for item in fields(made)})
    result = evaluate(policy, made, episodes=EPISODES, num_envs=50)
    result.write_csv(ROOT / file)


def run(task: str, way: Way, seed: int, threads: int) -> None:
    """Do what is missing of one cell."""
    store, folder = RUNS / task / f"pairs-seed{seed}.zarr", RUNS / task / f"{way.label}-seed{seed}"
    if not (ROOT / store).exists():
        run_script(
            "collect_preferences", f"checkpoint={base(task)}", *PAIRS[task], f"seed={seed}", f"threads={threads}",
            f"out={store}", f"run_dir={RUNS / task / f'collect-seed{seed}'}",
        )  # fmt: skip
    if not (ROOT / folder / "summary.json").exists():
        run_script(
            "finetune_preferences", f"checkpoint={base(task)}", f"pairs={store}", *way.options, f"seed={seed}",
            f"train.threads={threads}", "train.final_episodes=0", "video=false", "resume=true", f"run_dir={folder}",
        )  # fmt: skip
    evaluated(task, folder / "checkpoint", folder / "episodes.csv")


def report(task: str, seeds: list[int]) -> dict[str, Any]:
    """A row per way over the seeds that are there, and the base's."""
    root = ROOT / RUNS / task
    reference = columns_of(root / "base.csv")
    rows, missing = [_row("base", [reference], reference)], []
    for way in WAYS[task]:
        found = {seed: root / f"{way.label}-seed{seed}" for seed in seeds}
        missing += [folder.name for folder in found.values() if not (folder / "episodes.csv").exists()]
        there = {seed: folder for seed, folder in found.items() if (folder / "episodes.csv").exists()}
        if not there:
            continue
        row = _row(way.label, [columns_of(folder / "episodes.csv") for folder in there.values()], reference)
        trainings = [json.loads((folder / "summary.json").read_text()) for folder in there.values()]
        row |= {"seeds": list(there), "command": trainings[0]["command"], "date": trainings[-1]["date"]}
        row["pairs"] = [training["metrics"]["pairs"] for training in trainings]
        row["train_seconds"] = [training["metrics"]["train_seconds"] for training in trainings]
        rows.append(row)
    return {
        "task": task, "base": base(task), "episodes": EPISODES, "complete": not missing, "missing": missing,
        "command": f"python benchmarks/preferences.py {task}", "versions": versions(), "machine": machine(),
        "rows": rows,
    }  # fmt: skip


def _row(label: str, seeds: list[dict[str, np.ndarray]], reference: dict[str, np.ndarray]) -> dict[str, Any]:
    row: dict[str, Any] = {"way": label}
    for name in ("score", "return", "success", "length"):
        if name not in reference:
            continue
        values = [columns[name].astype(float) for columns in seeds]
        row[name] = float(np.mean(values))
        row[f"{name}_ci95"] = list(mean_interval_by_seed(values))
        row[f"{name}_by_seed"] = [float(part.mean()) for part in values]
        row[f"{name}_difference_ci95"] = list(
            paired_difference_interval(np.mean(values, 0), reference[name].astype(float))
        )
    return row


def runs_of(row: dict[str, Any]) -> list[str]:
    """Folders of the runs that a row rests on; the base's row is made anew."""
    return [f"{row['way']}-seed{seed}" for seed in row.get("seeds", ())]


def table(content: dict[str, Any]) -> str:
    """Markdown, a line per row."""
    lines = [
        "| | score | minus the base | return | minus the base | strict success | pairs | seconds |",
        "|" + " --- |" * 8,
    ]
    first = content["rows"][0]
    for row in content["rows"]:
        cells = [row["way"]]
        for name, digits in (("score", 4), ("return", 1)):
            low, high = row[f"{name}_difference_ci95"]
            change = row[name] - first[name]
            cells += [
                f"{row[name]:.{digits}f}",
                f"{change:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]",
            ]
        cells.append(f"{row['success']:.3f}" if "success" in row else "")
        cells += [f"{np.mean(row[key]):.0f}" if key in row else "" for key in ("pairs", "train_seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=sorted(WAYS))
    parser.add_argument("--report", action="store_true", help="collect what is there, train nothing")
    parser.add_argument("--only", default="", help="only ways whose label contains this text")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the runs to do")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.report:
        evaluated(arguments.task, base(arguments.task), RUNS / arguments.task / "base.csv")
        for seed in arguments.seeds:
            for way in WAYS[arguments.task]:
                if arguments.only in way.label:
                    run(arguments.task, way, seed, arguments.threads)
    name, task = f"preferences-{arguments.task}", arguments.task
    seeds = sorted({*SEEDS, *arguments.seeds})
    every = [f"{way.label}-seed{seed}" for way in WAYS[task] for seed in seeds]
    content = with_earlier(name, report(task, seeds), runs_of, every)
    publish(name, content, table(content))


if __name__ == "__main__":
    main()
