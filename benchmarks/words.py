"""One policy that is told in words which of two tasks to do, beside a policy for each of them; resumably.

    python benchmarks/words.py                  # does what is missing, in turn
    python benchmarks/words.py --seconds=280    # stops about then; the next call goes on
    python benchmarks/words.py --report         # only collects what is there

The tasks are Push-T's own and the same with the goal turned by 90 degrees. No policy observes the goal. The
demonstrations of the second task are the human ones turned about the middle of the table, which is a square:
it is the same motion seen from another side of the table. Needs
demonstrations/pusht.zarr.zip (scripts/import_demos.py). Results go to benchmarks/results/words.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy.data.store import Demonstrations, read_demonstrations, write_demonstrations
from flowpolicy.evaluation.summary import machine, versions
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/words")
HUMAN = ROOT / "demonstrations" / "pusht.zarr.zip"
WORDS = {0: "push the T onto the outline that leans left", 90: "push the T onto the outline that leans right"}
UNKNOWN = "please shove the tee over to the outline leaning left"
OBSERVED = {"one": "[observation]", "words": "[observation,task]"}
STEPS = {"words": 8000, "one0": 4000, "one90": 4000}
"""The one policy for both tasks sees as many samples of each as the policy of that task."""
EPISODES = 200


def turned(demos: Demonstrations) -> Demonstrations:
    """The episodes a quarter turn further about the middle of the table, 512 px wide."""
    arrays = dict(demos.arrays)
    for key in ("observation", "action"):
        pairs = demos.arrays[key].reshape(demos.num_steps, -1, 2)
        quarter = np.stack([512 - pairs[..., 1], pairs[..., 0]], -1)
        arrays[key] = quarter.reshape(demos.arrays[key].shape).astype(demos.arrays[key].dtype)
    return Demonstrations(arrays, demos.episode_ends, demos.attributes, demos.source)


def stores() -> dict[str, Path]:
    """The demonstrations of each policy, made where they are not there."""
    paths = {name: RUNS / f"{name}.zarr.zip" for name in STEPS}
    if all((ROOT / path).exists() for path in paths.values()):
        return paths
    human = read_demonstrations(HUMAN, ["observation"])
    of_task = {"one0": human, "one90": turned(human)}
    for name, demos in of_task.items():
        write_demonstrations(ROOT / paths[name], demos)
    both, steps = list(of_task.values()), human.num_steps
    arrays = {key: np.concatenate([demos.arrays[key] for demos in both]) for key in ("observation", "action")}
    arrays["task_index"] = np.repeat([0, 1], steps)
    ends = np.concatenate([human.episode_ends, steps + human.episode_ends])
    attributes = {**human.attributes, "tasks": list(WORDS.values())}
    attributes.pop("masks", None)
    write_demonstrations(ROOT / paths["words"], Demonstrations(arrays, ends, attributes))
    return paths


def trained(name: str) -> list[str]:
    return [
        "pretrain", "env=pusht", "policy=flow_matching", "model=small", f"data.path={stores()[name]}",
        f"data.observation_keys={OBSERVED[name.rstrip('0123456789')]}", f"train.steps={STEPS[name]}", "train.batch_size=128",
        "train.threads=1", "train.save_every=100", "train.final_episodes=0", "train.evaluate_every=0",
        *([f"env.instruction='{WORDS[0]}'"] if name == "words" else []),
        "resume=true", f"run_dir={RUNS}/{name}",
    ]  # fmt: skip


def evaluated(name: str, policy: str, degrees: int, words: str | None) -> list[str]:
    return [
        "evaluate", f"checkpoint={RUNS}/{policy}/checkpoint", "env=pusht",
        f"env.env_kwargs.goal_degrees={degrees}", f"episodes={EPISODES}", "num_envs=25", "video=false",
        *([f"env.instruction='{words}'"] if words else []), f"run_dir={RUNS}/{name}",
    ]  # fmt: skip


CELLS: dict[str, tuple[str, int, str | None]] = {
    "one policy, task 0": ("one0", 0, None),
    "one policy, task 90": ("one90", 90, None),
    "words 0, task 0": ("words", 0, WORDS[0]),
    "words 90, task 90": ("words", 90, WORDS[90]),
    "words 90, task 0": ("words", 0, WORDS[90]),
    "words 0, task 90": ("words", 90, WORDS[0]),
    "unknown words, task 0": ("words", 0, UNKNOWN),
}


def folder_of(label: str) -> str:
    return f"evaluate-{label.replace(',', '').replace(' ', '-')}"


def stages() -> dict[str, list[str]]:
    """Each policy's training, and then its evaluations."""
    found = {}
    for policy in STEPS:
        found[policy] = trained(policy)
        cells = {folder_of(label): cell for label, cell in CELLS.items() if cell[0] == policy}
        found.update({name: evaluated(name, *cell) for name, cell in cells.items()})
    return found


def run(command: list[str], seconds: float) -> bool:
    """One stage; False where its time was over. What it had saved is there for the next call."""
    script = [sys.executable, "-m", "flowpolicy", *command]
    folder = ROOT / command[-1].removeprefix("run_dir=")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        try:
            subprocess.run(script, cwd=ROOT, check=True, timeout=seconds, stdout=log, stderr=log)
        except subprocess.TimeoutExpired:
            return False
    return True


def is_done(name: str) -> bool:
    return (ROOT / RUNS / name / "summary.json").exists()


def collect() -> dict[str, Any]:
    """Score of each cell, ratios of the one policy to the two, and what is missing."""
    cells = {
        label: read_json(ROOT / RUNS / folder_of(label) / "summary.json", "summary")["metrics"]
        for label in CELLS
        if is_done(folder_of(label))
    }
    kept = ("score_mean", "score_ci95", "success_rate", "success_ci95", "episodes")
    found: dict[str, Any] = {
        "cells": {label: {key: cell[key] for key in cell if key in kept} for label, cell in cells.items()},
        "words": {str(degrees): words for degrees, words in WORDS.items()},
        "unknown": UNKNOWN,
        "steps": STEPS,
        "incomplete": [name for name in stages() if not is_done(name)],
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    scores = {label: cell.get("score_mean") for label, cell in cells.items()}
    for degrees in WORDS:
        told, alone = (
            scores.get(f"words {degrees}, task {degrees}"),
            scores.get(f"one policy, task {degrees}"),
        )
        if told is not None and alone:
            found.setdefault("ratio", {})[str(degrees)] = told / alone
    log = ROOT / RUNS / "evaluate-unknown-words-task-0.log"
    if log.exists():
        found["warned"] = "was not trained with the words" in log.read_text()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=np.inf)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    for name, command in {} if options.report else stages().items():
        left = options.seconds - (time.monotonic() - started)
        if left < 10:
            break
        if not is_done(name) and not run(command, left if np.isfinite(left) else None):
            break
    results = collect()
    write_json(ROOT / "benchmarks" / "results" / "words.json", results)
    print(results["cells"], results.get("ratio"), "missing:", results["incomplete"])


if __name__ == "__main__":
    main()
