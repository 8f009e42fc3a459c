"""Ant and Humanoid from nothing: experts, medium demonstrations, pretraining, ReinFlow, as far as the machine's time allows.

    python benchmarks/ant_humanoid.py ant                # goes on where it was, until all is done
    python benchmarks/ant_humanoid.py ant --minutes 60   # or until the expert has had so long
    python benchmarks/ant_humanoid.py ant --report       # only collects what is there

Every step is the real script. Demonstrations are those of the two checkpoints whose returns were nearest to half of the best.
Results go to benchmarks/results/ant-humanoid.json, which says what is not done yet. Published, for comparison (Zhang et al.
2025, the better of two policies): Ant 2088 before and 4106 after, Humanoid 2122 and 5076.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from imitation import ROOT, run_script

from flowpolicy.evaluation.summary import machine, versions
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json

RUNS = ROOT / "runs" / "benchmarks" / "ant_humanoid"
RESULT = ROOT / "benchmarks" / "results" / "ant-humanoid.json"
PUBLISHED = {"ant": (2088, 4106), "humanoid": (2122, 5076)}
STEPS = 80_000  # of the demonstrations


class Study:
    """One task's folders, and the scripts that fill them."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.expert, self.collected, self.trained, self.tuned = (
            RUNS / task / part for part in ("expert", "collect", "train", "finetune")
        )

    def train_expert(self, minutes: float | None) -> bool:
        """Go on with the expert; False where its time was over before it was done. A stopped one keeps its last checkpoint."""
        if (self.expert / "summary.json").exists():
            return True
        command = [
            sys.executable, "scripts/train_expert.py", f"env={self.task}", "resume=true",
            f"run_dir={self.expert.relative_to(ROOT)}",
        ]  # fmt: skip
        with subprocess.Popen(command, cwd=ROOT) as process:
            try:
                process.wait(None if minutes is None else 60 * minutes)
            except subprocess.TimeoutExpired:
                process.terminate()
        return (self.expert / "summary.json").exists()

    def evaluations(self) -> dict[int, float]:
        """Mean return of the expert's checkpoints, by steps."""
        file = self.expert / "checkpoints.csv"
        if not file.exists():
            return {}
        with file.open(newline="") as stream:
            return {int(row["steps"]): float(row["return_mean"]) for row in csv.DictReader(stream)}

    def carry_out(self) -> None:
        """Everything after the expert."""
        found = self.evaluations()
        half = max(found.values()) / 2
        actors = sorted(sorted(found, key=lambda steps: abs(found[steps] - half))[:2])
        store = self.collected / "demonstrations.zarr.zip"
        self._do(
            "collect_demos", self.collected, "level=medium", f"actors={actors}", f"steps={STEPS}",
            "allow_outside_band=true", f"actors_dir={(self.expert / 'actors').relative_to(ROOT)}",
            f"out={store.relative_to(ROOT)}",
        )  # fmt: skip
        self._do(
            "pretrain", self.trained, "policy=flow_matching", f"data.path={store.relative_to(ROOT)}",
            "train.threads=2", "video=false", "resume=true",
        )  # fmt: skip
        checkpoint = (self.trained / "checkpoint").relative_to(ROOT)
        self._do(
            "finetune_reinflow", self.tuned, f"checkpoint={checkpoint}", "evaluate_every=250000",
            "resume=true", f"workers={os.cpu_count()}",
        )  # fmt: skip

    def _do(self, script: str, folder: Path, *options: str) -> None:
        if not (folder / "summary.json").exists():
            run_script(script, f"env={self.task}", *options, f"run_dir={folder.relative_to(ROOT)}")

    def report(self) -> dict[str, Any]:
        """What is there of it."""
        parts = {
            "expert": self.expert, "demonstrations": self.collected, "pretraining": self.trained, "reinflow": self.tuned,
        }  # fmt: skip
        done = {
            name: read_json(file)
            for name, folder in parts.items()
            if (file := folder / "summary.json").exists()
        }
        row: dict[str, Any] = {
            "missing": [name for name in parts if name not in done], "expert_return_by_steps": self.evaluations(),
            "published": dict(zip(("base", "tuned"), PUBLISHED[self.task], strict=True)),
            "commands": {name: summary["command"] for name, summary in done.items()},
            "wall_seconds": {name: summary["wall_seconds"] for name, summary in done.items()},
        }  # fmt: skip
        if "reinflow" in done:
            metrics = done["reinflow"]["metrics"]
            row |= {"base": metrics["base"], "tuned": metrics["tuned"], "steps": done["reinflow"]["steps"]}
        return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=sorted(PUBLISHED))
    parser.add_argument("--minutes", type=float, help="for the expert, in this call")
    parser.add_argument("--report", action="store_true", help="only collect what is there")
    arguments = parser.parse_args()
    study = Study(arguments.task)
    if not arguments.report and study.train_expert(arguments.minutes):
        study.carry_out()
    rows = {task: Study(task).report() for task in PUBLISHED}
    write_json(RESULT, {
        "command": "python benchmarks/ant_humanoid.py TASK", "complete": not any(row["missing"] for row in rows.values()),
        "tasks": rows, "machine": machine(), "versions": versions(),
    })  # fmt: skip
    for task, row in rows.items():
        returns = row["expert_return_by_steps"]
        best = f"best expert so far {max(returns.values()):.0f}" if returns else "no expert yet"
        print(f"{task}: {best}; missing: {', '.join(row['missing']) or 'nothing'}")


if __name__ == "__main__":
    main()
