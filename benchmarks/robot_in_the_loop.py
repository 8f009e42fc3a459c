"""Fine-tuning with a robot in the loop: ten minutes of wall-clock time on a simulated robot at its native rate.

    python benchmarks/robot_in_the_loop.py              # carries out what is missing, writes the JSON
    python benchmarks/robot_in_the_loop.py --seeds 0    # of one seed
    python benchmarks/robot_in_the_loop.py --minutes 2 --seeds 0 --runs runs/pilot   # a pilot
    python benchmarks/robot_in_the_loop.py --report     # only collects what is there

Hopper runs in a process of its own at 125 Hz and is controlled by the control loop, with inference in a second
process and the learner in a third, on the other core. A session that was cut off is gone on with until the minutes
are over. Pretrained and fine-tuned policy are then evaluated on the same episodes, as deployed: without exploration.
The machine should have two cores and nothing else to do. Results go to benchmarks/results/robot-in-the-loop.json.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy import FlowPolicy
from flowpolicy.evaluation.rollout import evaluate
from flowpolicy.evaluation.statistics import mean_interval, paired_difference_interval
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import task_of
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.runs.loggers import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "benchmarks" / "robot_in_the_loop"
RESULT = ROOT / "benchmarks" / "results" / "robot-in-the-loop.json"
BASE = "benchmarks/checkpoints/hopper-flow_matching-4-a-token-seed0"
STEPS = 2  # K, so that a chunk is there within a tick
SEEDS = (0, 1, 2)
OF_TICKS = ("ticks", "jitter_ms", "inference_ms", "delays", "events")
SETTINGS = (
    "env=hopper", f"checkpoint={BASE}", f"num_steps={STEPS}", "algorithm=dsrl",
    "algorithm.actor_hidden=[128,128]", "offpolicy.members=2", "offpolicy.critic_hidden=[128,128]",
    "offpolicy.batch_size=128", "control.wait_share=0.9",
)  # fmt: skip


def carry_out(folder: Path, seed: int, minutes: float, episodes: int) -> None:
    """What is missing of a seed."""
    run = folder / f"seed{seed}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while (left := 60 * minutes - seconds_of(run)) > 1:
        words = (f"seed={seed}", f"duration_s={left:.1f}", f"run_dir={run}", "resume=true")
        before = seconds_of(run)
        command = [sys.executable, "scripts/finetune_robot.py", *SETTINGS, *words]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        if seconds_of(run) <= before:
            raise SystemExit(f"{run}: the session did not run")
    for name, checkpoint in (("before", ROOT / BASE), ("after", run / "checkpoint")):
        if not (run / f"episodes_{name}.csv").exists():
            policy = FlowPolicy.load(checkpoint)
            task = task_of(policy.spec.task, None, checkpoint)
            found = evaluate(policy, task, episodes=episodes, num_steps=STEPS, show_progress=False)
            found.write_csv(run / f"episodes_{name}.csv")


def sessions_of(run: Path) -> list[dict[str, Any]]:
    """Summaries of the sessions that came to their end."""
    return [read_json(file) for file in sorted(run.glob("sessions/*/summary.json"))]


def seconds_of(run: Path) -> float:
    """Seconds that the robot has been controlled for."""
    return float(sum(session["metrics"].get("seconds", 0.0) for session in sessions_of(run)))


def row_of(run: Path, seed: int) -> dict[str, Any]:
    """What a seed found out."""
    sessions, returns = sessions_of(run), {}
    for name in ("before", "after"):
        with (run / f"episodes_{name}.csv").open(newline="") as stream:
            returns[name] = np.array([float(row["return"]) for row in csv.DictReader(stream)])
    before, after = returns["before"], returns["after"]
    episodes = [row["rollout/return"] for row in read_metrics(run / "metrics.csv")]
    third = max(1, len(episodes) // 3)
    return {
        "seed": seed, "seconds": seconds_of(run), "sessions": len(sessions),
        "return_before": float(before.mean()), "return_before_ci95": list(mean_interval(before)),
        "return_after": float(after.mean()), "return_after_ci95": list(mean_interval(after)),
        "return_gain": float((after - before).mean()),
        "return_gain_ci95": list(paired_difference_interval(after, before)),
        "episodes_on_the_robot": len(episodes),
        "return_on_the_robot": {
            "first_third": float(np.mean(episodes[:third])), "last_third": float(np.mean(episodes[-third:])),
        },
        "learner": sessions[-1]["about"]["learner"],
        "ticks": [{name: session["metrics"][name] for name in OF_TICKS} for session in sessions],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="to carry out")
    parser.add_argument("--minutes", type=float, default=10.0, help="on the robot")
    parser.add_argument("--episodes", type=int, default=100, help="of each evaluation")
    parser.add_argument("--runs", type=Path, default=RUNS, help="of the runs; another one writes no JSON")
    parser.add_argument("--report", action="store_true", help="only collect what is there")
    arguments = parser.parse_args()
    folder = arguments.runs.resolve()
    for seed in () if arguments.report else arguments.seeds:
        carry_out(folder, seed, arguments.minutes, arguments.episodes)
    known = sorted({*SEEDS, *arguments.seeds})
    done = [seed for seed in known if (folder / f"seed{seed}" / "episodes_after.csv").exists()]
    rows = [row_of(folder / f"seed{seed}", seed) for seed in done]
    commit, dirty = git_state()
    content = {
        "command": "python benchmarks/robot_in_the_loop.py", "minutes": arguments.minutes,
        "missing": [seed for seed in known if seed not in done], "settings": list(SETTINGS),
        "episodes": arguments.episodes, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(), "versions": versions(), "git_commit": commit, "git_dirty": dirty, "rows": rows,
    }  # fmt: skip
    if folder == RUNS:
        write_json(RESULT, content)
    print("| seed | before | after | gain | updates | p99 of a tick's lateness, ms |\n" + "| --- " * 6 + "|")
    for row in rows:
        low, high = row["return_gain_ci95"]
        late = max(session["jitter_ms"]["p99"] for session in row["ticks"])
        print(
            f"| {row['seed']} | {row['return_before']:.0f} | {row['return_after']:.0f} | "
            f"{row['return_gain']:+.0f} [{low:.0f}, {high:.0f}] | {row['learner']['updates']} | {late:.3f} |"
        )


if __name__ == "__main__":
    main()
