"""Distil the committed flow-matching policies by every method and evaluate the students, resumably, into one table.

    python benchmarks/distillation.py pusht            # trains what is missing, evaluates, writes the JSON
    python benchmarks/distillation.py pusht --report   # only collects what is there
    python benchmarks/distillation.py hopper --only direct --seeds 0

Every run is the real `scripts/distill.py` and `scripts/evaluate.py`; the command of each training is in its row. The pairs
of a task are made once and shared. Students are compared with their teacher at K = 16 on 400 episodes with the same starts
and the same noise. Results go to benchmarks/results/distillation-<task>.json; one whose runs are not all there says so.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from earlier import with_earlier
from imitation import ROOT, columns_of, publish, run_script

from flowpolicy.evaluation.statistics import (
    mean_interval_by_seed,
    paired_difference_interval,
    seeds_interval,
    success_interval_by_seed,
)

RUNS = Path("runs/benchmarks/distillation")
SEEDS = (0, 1, 2)
EPISODES, REFERENCE = 400, 16
PAIRS = ("pairs.count=40000", "pairs.num_steps=8", "pairs.solver=midpoint")
MORE = ("pairs.count=160000", "pairs.num_steps=8", "pairs.solver=ab3")
"""Four times as many at twice the cost: the 40,000 are learned by heart in a longer training, `direct-long`."""
SMALL = ("model=small", "model.width=40", "model.depth=3", "train.steps=8000")
"""Less than a quarter of the parameters, which cannot start from the teacher's weights."""

SMALLER = (
    "model=small", "model.width=40", "model.depth=3", "model.actions_per_token=4", "train.steps=20000", "train.learning_rate=2e-3",
)  # fmt: skip
"""With four actions a token it sees as many pairs in a third of the time."""

TRANSPORT = ("train.steps=1200", "train.batch_size=128")
"""A sample costs three times as much as one of `direct`, and all but `small-*` are to take some ten minutes."""

MEAN_FLOW = ("model.actions_per_token=4", "train.steps=4000")
"""Its derivative along the path makes a step several times as long, and four actions a token a third as long."""


@dataclass(frozen=True)
class Student:
    """One way to make a student.

    Attributes:
        label: of the folder and the table.
        method: of distillation; without one it is pretrained from scratch as a mean flow.
        steps: K that it is trained for and evaluated at.
        options: for training.
        init: label of the student that it starts from.
        one_training: whether one training is for all K.
        pairs: how the teacher makes them.
    """

    label: str
    method: str
    steps: tuple[int, ...] = (1, 2)
    options: tuple[str, ...] = ()
    init: str = ""
    one_training: bool = False
    pairs: tuple[str, ...] = PAIRS


STUDENTS = (
    Student("direct", "direct"),
    Student("direct-long", "direct", (1,), ("train.steps=8000",)),
    Student("direct-more", "direct", (1,), ("train.steps=8000",), pairs=MORE),
    Student("reflow", "reflow", one_training=True),  # d = 0: valid for any K
    Student("reflow-direct", "direct", (1,), init="reflow"),
    Student(
        "direct-adversarial",
        "adversarial",
        options=("train.steps=1000", "train.learning_rate=3e-4"),
        init="direct",
    ),
    Student("transport", "transport", options=TRANSPORT),
    Student("small-direct", "direct", options=SMALL),
    Student("small-direct-more", "direct", (1,), SMALLER, pairs=MORE),
    Student("small-slimflow", "slimflow", options=SMALL),
    Student("mean-flow", "", options=MEAN_FLOW, one_training=True),
)
DEPTHS = {"pusht": 3, "hopper": 2}
"""Layers of the teachers."""


@dataclass(frozen=True)
class Cell:
    """A student of one seed, trained for one K."""

    task: str
    student: Student
    num_steps: int
    seed: int

    @property
    def folder(self) -> Path:
        return RUNS / self.task / f"{self.student.label}-K{self.num_steps}-seed{self.seed}"

    @property
    def start(self) -> Cell | None:
        """The student whose weights its training begins with; None: the teacher or nobody."""
        first = next((other for other in STUDENTS if other.label == self.student.init), None)
        return None if first is None else Cell(self.task, first, self.num_steps, self.seed)

    @property
    def evaluated(self) -> tuple[int, ...]:
        return self.student.steps if self.student.one_training else (self.num_steps,)


def cells(task: str, seeds: list[int]) -> list[Cell]:
    """Every cell of a task."""
    return [
        Cell(task, student, num_steps, seed)
        for seed in seeds
        for student in STUDENTS
        for num_steps in (student.steps[:1] if student.one_training else student.steps)
    ]


def teacher(task: str) -> str:
    """The committed policy that is distilled."""
    return f"benchmarks/checkpoints/{task}-flow_matching-seed0"


def distil(cell: Cell, threads: int) -> None:
    """Do what is missing of one cell; both scripts write their summary last."""
    student, folder = cell.student, cell.folder
    common = [
        f"env={cell.task}", *student.options, f"seed={cell.seed}", f"train.threads={threads}",
        "train.final_episodes=0", "video=false", "resume=true", f"run_dir={folder / 'train'}",
    ]  # fmt: skip
    if cell.start is not None:
        distil(cell.start, threads)
        common.append(f"init={cell.start.folder / 'train' / 'checkpoint'}")
    if (ROOT / folder / "train" / "summary.json").exists():
        pass
    elif student.method:
        pairs = "pairs" if student.pairs == PAIRS else "more-pairs"
        run_script(
            "distill", f"checkpoint={teacher(cell.task)}", f"method={student.method}",
            f"method.num_steps={cell.num_steps}", f"pairs.path={RUNS / cell.task / pairs}", *student.pairs, *common,
        )  # fmt: skip
    else:
        run_script("pretrain", "policy=mean_flow", f"model.depth={DEPTHS[cell.task]}", *common)
    evaluate(cell.task, folder / "train" / "checkpoint", folder / "evaluate", cell.evaluated, "force=true")


def evaluate(task: str, checkpoint: Path | str, folder: Path, steps: tuple[int, ...], *options: str) -> None:
    """Evaluate unless that is done."""
    if not (ROOT / folder / "summary.json").exists():
        run_script(
            "evaluate", f"checkpoint={checkpoint}", f"env={task}", f"num_steps={steps[0]}",
            f"k_sweep=[{','.join(map(str, steps))}]", f"episodes={EPISODES}", "num_envs=50", "threads=1",
            "video=false", *options, f"run_dir={folder}",
        )  # fmt: skip


def report(task: str, found: list[Cell]) -> dict[str, Any]:
    """A row per student and K over the seeds that are there, and the teacher's rows."""
    ours = ROOT / RUNS / task / "teacher"
    baseline = {k: columns_of(ours / f"episodes_K{k}.csv") for k in (1, 2, 4, REFERENCE)}
    evaluation = json.loads((ours / "summary.json").read_text())
    rows = [_row("teacher", k, [columns], baseline[REFERENCE]) for k, columns in baseline.items()]
    missing, groups = [], dict[tuple[str, int], list[tuple[Cell, dict[str, np.ndarray]]]]()
    for cell in found:
        folder = ROOT / cell.folder
        if not (folder / "evaluate" / "summary.json").exists():
            missing.append(cell.folder.name)
            continue
        for k in cell.evaluated:
            columns = columns_of(folder / "evaluate" / f"episodes_K{k}.csv")
            groups.setdefault((cell.student.label, k), []).append((cell, columns))
    for (label, k), parts in groups.items():
        row = _row(label, k, [columns for _, columns in parts], baseline[REFERENCE])
        trainings = [_training(cell) for cell, _ in parts]
        row["seeds"] = [training["seed"] for training in trainings]
        row["parameters"] = trainings[0]["parameters"]
        row["validation_action_error"] = [
            training["metrics"]["validation/action_error"] for training in trainings
        ]
        row["train_seconds"] = [_seconds(cell) for cell, _ in parts]
        row["prepare_seconds"] = [training["metrics"].get("prepare_seconds", 0.0) for training in trainings]
        row["command"] = trainings[0]["command"]
        rows.append(row)
    return {
        "task": task, "teacher": teacher(task), "complete": not missing, "missing": missing,
        "command": f"python benchmarks/distillation.py {task}",
        "pairs_seconds": max((max(row.get("prepare_seconds", [0.0])) for row in rows), default=None),
        **{key: evaluation[key] for key in ("versions", "machine", "date")}, "rows": rows,
    }  # fmt: skip


def _training(cell: Cell) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / cell.folder / "train" / "summary.json").read_text())
    return content


def _seconds(cell: Cell) -> float:
    """Of the training, and of those that it starts from; without preparation."""
    metrics = _training(cell)["metrics"]
    own = float(metrics["train_seconds"]) - float(metrics.get("prepare_seconds", 0.0))
    return own + (0.0 if cell.start is None else _seconds(cell.start))


def _row(
    label: str, k: int, seeds: list[dict[str, np.ndarray]], teacher: dict[str, np.ndarray]
) -> dict[str, Any]:
    row: dict[str, Any] = {"student": label, "num_steps": k, "episodes": sum(len(s["return"]) for s in seeds)}
    for name, interval in (
        ("return", mean_interval_by_seed), ("score", mean_interval_by_seed), ("success", success_interval_by_seed),
    ):  # fmt: skip
        if name not in seeds[0]:
            continue
        values, reference = [columns[name] for columns in seeds], teacher[name]
        row[name] = float(np.concatenate(values).mean())
        row[f"{name}_ci95"] = list(interval(values))
        row[f"{name}_by_seed"] = [float(part.mean()) for part in values]
        row[f"{name}_over_teacher"] = row[name] / max(float(reference.mean()), 1e-9)
        row[f"{name}_difference"] = row[name] - float(reference.mean())
        row[f"{name}_difference_ci95"] = _difference_interval(values, reference.astype(float))
    return row


def _difference_interval(values: list[np.ndarray], reference: np.ndarray) -> list[float]:
    """Of the mean difference from the teacher on the same episodes: over episodes, and not inside that over seeds."""
    low, high = paired_difference_interval(np.mean(values, 0), reference)
    if len(values) > 1:
        least, most = seeds_interval([float((part - reference).mean()) for part in values])
        low, high = min(low, least), max(high, most)
    return [low, high]


def runs_of(row: dict[str, Any]) -> list[str]:
    """Folders of the runs that a row rests on; the teacher's row is made anew."""
    label, k = row["student"], row["num_steps"]
    student = next((student for student in STUDENTS if student.label == label), None)
    trained = student.steps[0] if student is not None and student.one_training else k
    return [f"{label}-K{trained}-seed{seed}" for seed in row.get("seeds", ())]


def table(content: dict[str, Any]) -> str:
    """Markdown, a line per row."""
    main = "score" if "score" in content["rows"][0] else "return"
    lines = [
        f"| student | K | {main} | minus the teacher at K = {REFERENCE} | strict success | parameters | seconds |",
        "|" + " --- |" * 7,
    ]
    for row in content["rows"]:
        digits = 3 if main == "score" else 0
        low, high = row[f"{main}_ci95"]
        least, most = row[f"{main}_difference_ci95"]
        success = f"{row['success']:.2f}" if "success" in row else ""
        seconds = f"{np.mean(row['train_seconds']):.0f}" if "train_seconds" in row else ""
        lines.append(
            f"| {row['student']} | {row['num_steps']} | {row[main]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}] "
            f"| {row[f'{main}_difference']:+.{digits}f} [{least:+.{digits}f}, {most:+.{digits}f}] | {success} "
            f"| {row.get('parameters', '')} | {seconds} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("pusht", "hopper"))
    parser.add_argument("--report", action="store_true", help="collect what is there, train nothing")
    parser.add_argument("--only", default="", help="only cells whose folder begins with this text")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the trainings to do")
    arguments = parser.parse_args()
    task = arguments.task
    found = cells(task, sorted({*SEEDS, *arguments.seeds}))
    if not arguments.report:
        evaluate(task, teacher(task), RUNS / task / "teacher", (REFERENCE, 1, 2, 4))
        for cell in found:
            if cell.seed in arguments.seeds and cell.folder.name.startswith(arguments.only):
                distil(cell, arguments.threads)
    content = with_earlier(
        f"distillation-{task}", report(task, found), runs_of, [cell.folder.name for cell in found]
    )
    publish(f"distillation-{task}", content, table(content))


if __name__ == "__main__":
    main()
