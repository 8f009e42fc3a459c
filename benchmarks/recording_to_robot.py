"""From a recording to a robot: Push-T as a LeRobot video dataset, trained without a simulator.

    python benchmarks/recording_to_robot.py --zarr PATH      # stages that are missing; writes the JSON

The 206 human episodes of Push-T become a LeRobot dataset (images as H.264 videos, the agent's position as state). The
commands are those of docs/from_your_recording.md: import it, pretrain on images and position with the task file that
importing wrote (no simulator is named: what training says is open loop), and control gym-pusht, which stands for the
robot. Rollouts of the same checkpoint in gym-pusht on unseen seeds give the score.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy.evaluation.statistics import mean_interval
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "recording-to-robot.json"
STEPS = 16000  # 40 passes, which is what importing asks for
WORDS = "push the T-shaped block onto its outline"


def stages(zarr: Path, folder: Path, threads: int) -> dict[str, list[str]]:
    """Name to command; each leaves ``summary.json`` in its run folder."""
    dataset, store, raw = folder / "lerobot", folder / "push.zarr.zip", folder / "raw.zarr.zip"
    checkpoint = folder / "pretrain" / "checkpoint"
    return {
        "read the recording": [
            "import-demos", "env=pusht_image", f"source={zarr}", f"out={raw}", "keys=[image,agent_position]"
        ],
        "make the dataset": [
            "export-demos", f"path={raw}", f"out={dataset}", "format=lerobot", "images=h264", f"task='{WORDS}'",
        ],
        "import": ["import-demos", f"source={dataset}", f"out={store}"],
        "pretrain": [
            "pretrain", f"env={store.with_name('push.yaml')}", "policy=flow_matching",
            "env.observation_keys=[agent_position,image]", "env.obs_horizon=1", f"train.steps={STEPS}",
            "train.batch_size=64", f"train.threads={threads}", "seed=0", "resume=true",
        ],
        "rollouts": [
            "evaluate", f"checkpoint={checkpoint}", "env=pusht_image", "num_steps=4", "episodes=200", "num_envs=50",
            f"threads={threads}", "video=1",
        ],
        "control": [
            "run-control", f"checkpoint={checkpoint}", "env=pusht_image", "duration_s=900", "video=false",
        ],
    }  # fmt: skip


def run(name: str, words: list[str], folder: Path, zarr: Path) -> dict[str, Any]:
    """Do a stage that was not done before; its command, seconds and metrics."""
    run_dir = folder / name.replace(" ", "_")
    summary = run_dir / "summary.json"
    if not summary.exists():
        started = time.time()
        command = [sys.executable, "-m", "flowpolicy", *words, f"run_dir={run_dir}"]
        print(shlex.join(command[1:]), flush=True)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        print(f"{name}: {time.time() - started:.0f} s", flush=True)
    found: dict[str, Any] = read_json(summary)
    kept = {key: found[key] for key in ("wall_seconds", "metrics", "machine", "date") if key in found}
    told = json.dumps({"command": shlex.join(["flowpolicy", *words]), **kept})
    result: dict[str, Any] = json.loads(told.replace(f"{folder}/", "").replace(str(zarr), "PATH"))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zarr", required=True, type=Path, help="pusht_cchi_v7_replay.zarr.zip")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmarks" / "recording_to_robot")
    parser.add_argument("--threads", type=int, default=1, help="of training and rollouts")
    parser.add_argument("--output", type=Path, default=RESULT, help="another JSON file, for a trial")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "command": "python benchmarks/recording_to_robot.py --zarr PATH",
        "machine": machine(),
        "versions": versions(),
        "stages": {},
    }
    for name, words in stages(arguments.zarr.resolve(), folder, arguments.threads).items():
        content["stages"][name] = run(name, words, folder, arguments.zarr.resolve())
        content |= {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_commit": git_state()[0],
        }
        write_json(arguments.output, content)
    world = content["stages"]["control"]["metrics"]["world"]
    scores = np.asarray(world["score"][: world["episodes_finished"]])
    low, high = mean_interval(scores)
    content["control_score"] = {"mean": scores.mean(), "ci95": [low, high], "episodes": len(scores)}
    write_json(arguments.output, content)
    score = content["stages"]["rollouts"]["metrics"]["score_mean"]
    print(f"score {score:.3f} over rollouts, {scores.mean():.3f} [{low:.3f}, {high:.3f}] in the control loop")


if __name__ == "__main__":
    main()
