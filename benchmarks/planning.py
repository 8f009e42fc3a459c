"""Whether plans keep their promise: 10,000 calls after planning, for three periods, in a fresh process.

    python benchmarks/planning.py                  # plans and calls that are missing; writes the JSON
    python benchmarks/planning.py --again          # all anew
    python benchmarks/planning.py --periods 20 60 200 --output FILE backends=[onnx]   # on a busy machine, say

Each plan is made by the real `scripts/plan.py`. Then a new process builds the chosen sampler and calls it 10,000 times on
observations of other episodes, and counts the calls that took longer than the period. The promise is kept when the 95%
(Wilson) interval of that share reaches down to 1 - quantile, and the action error is within its bound.
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
import torch

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.choosing.candidates import reference_of
from flowpolicy.acceleration.choosing.plan import DeploymentPlan
from flowpolicy.acceleration.observations import observations_of
from flowpolicy.evaluation.statistics import percentiles, wilson_interval
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import task_of
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "benchmarks" / "planning"
CHECKPOINT = "benchmarks/checkpoints/pusht-flow_matching-seed0"
PERIODS_MS = (3.0, 10.0, 30.0)
QUANTILE, MAX_ERROR = 0.99, 0.1
CALLS, OBSERVATIONS, SEED = 10_000, 64, 8_000_000


def plan(checkpoint: str, period: float, episodes: int, overrides: list[str]) -> Path:
    """Run the script; the plan's file."""
    task = FlowPolicy.load(ROOT / checkpoint).spec.task["name"]
    folder = RUNS / f"{task}-{period:g}ms"
    options = [
        f"checkpoint={checkpoint}", f"period_ms={period}", f"quantile={QUANTILE}", f"max_action_error={MAX_ERROR}",
        f"episodes={episodes}", f"env={task}", f"run_dir={folder.relative_to(ROOT)}", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "scripts/plan.py", *options], cwd=ROOT, check=False, env=environment
    )
    if done.returncode != 0:
        raise SystemExit(
            f"There is no plan for {period:g} ms here; try other --periods, or a quieter machine."
        )
    return folder / "plan.json"


def call(checkpoint: str, file: Path) -> dict[str, Any]:
    """Call a plan's sampler as a control loop would, on observations it was not made from."""
    torch.set_num_threads(1)
    policy = FlowPolicy.load(ROOT / checkpoint)
    found = DeploymentPlan.load(file)
    found.check(policy)
    sampler: Any = found.deployed(str(ROOT / checkpoint)).build()
    task = task_of(policy.spec.task, None, checkpoint)
    observations = observations_of(policy, task, OBSERVATIONS, episodes=16, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    rows = [{key: value[i : i + 1] for key, value in observations.items()} for i in range(OBSERVATIONS)]
    seconds = []
    for number in range(-20, CALLS):
        noise = torch.randn(1, policy.spec.action_horizon, policy.spec.action_dim, generator=generator)
        started = time.perf_counter()
        sampler(rows[number % OBSERVATIONS], noise)
        if number >= 0:
            seconds.append(time.perf_counter() - started)
    noise = torch.randn(OBSERVATIONS, policy.spec.action_horizon, policy.spec.action_dim, generator=generator)
    normalize = policy.action_normalizer.normalize
    wanted = normalize(policy.act(observations, sampler=reference_of(policy), noise=noise))
    error = (normalize(sampler(observations, noise)) - wanted).square().mean().sqrt()
    milliseconds = 1e3 * np.array(seconds)
    return {"milliseconds": percentiles(milliseconds), "late": int((milliseconds > found.period_ms).sum()),
            "late_by_thousand": (milliseconds > found.period_ms).reshape(-1, 1000).sum(1).tolist(),
            "calls": CALLS, "action_error": float(error)}  # fmt: skip


def row_of(period: float, file: Path, called: dict[str, Any]) -> dict[str, Any]:
    """A plan and what became of it."""
    chosen = read_json(file)
    low, high = wilson_interval(called["late"], called["calls"])
    return {
        "period_ms": period,
        "plan": {key: chosen[key] for key in ("sampler", "fast", "rollouts", "reason")},
        **called,
        "late_share": called["late"] / called["calls"],
        "late_share_ci95": [low, high],
        "promise_kept": bool(low <= 1 - QUANTILE and called["action_error"] <= MAX_ERROR),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| period ms | chosen | backend | NFE | promised 99% below ms | p50 | p99 | late calls | share [95%] "
        "| action error | kept |",
        "|" + " --- |" * 11,
    ]
    for row in rows:
        chosen = row["plan"]["sampler"]
        how = chosen["sampling"]
        name = f"K = {how['num_steps']} {how['solver']}" + (", cached" if how.get("schedule") else "")
        low, high = row["late_share_ci95"]
        cells = [
            f"{row['period_ms']:g}",
            name,
            how["backend"],
            chosen["nfe"],
            f"{chosen['latency_ms']['bound']:.2f}",
        ]
        cells += [f"{row['milliseconds'][key]:.2f}" for key in ("p50", "p99")]
        cells += [
            row["late"],
            f"{row['late_share']:.4f} [{low:.4f}, {high:.4f}]",
            f"{row['action_error']:.4f}",
        ]
        lines.append("| " + " | ".join(map(str, [*cells, "yes" if row["promise_kept"] else "**no**"])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--periods", type=float, nargs="+", default=PERIODS_MS, help="ms")
    parser.add_argument("--output", default="", help="another JSON file, for a trial")
    parser.add_argument("overrides", nargs="*", help="further settings of scripts/plan.py")
    parser.add_argument("--episodes", type=int, default=25, help="of each candidate at the front")
    parser.add_argument(
        "--call", type=Path, default=None, help="call this plan's sampler and print the figures"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.call is not None:
        print(json.dumps(call(arguments.checkpoint, arguments.call)))
        return
    path = Path(arguments.output or ROOT / "benchmarks" / "results" / "planning.json")
    done = {row["period_ms"]: row for row in read_json(path)["rows"]} if path.exists() else {}
    for period in arguments.periods:
        if period not in done or arguments.again:
            file = plan(arguments.checkpoint, period, arguments.episodes, arguments.overrides)
            command = [sys.executable, __file__, "--checkpoint", arguments.checkpoint, "--call", str(file)]
            answer = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            done[period] = row_of(period, file, json.loads(answer.stdout.splitlines()[-1]))
        rows = [done[period] for period in arguments.periods if period in done]
        content = {
            "command": shlex.join(["python", "benchmarks/planning.py", *sys.argv[1:]]), "checkpoint": arguments.checkpoint, "quantile": QUANTILE,
            "max_action_error": MAX_ERROR, "first_seed": SEED, "rows": rows, "machine": machine(),
            "complete": len(rows) == len(arguments.periods), "versions": versions(), "git_commit": git_state()[0],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        write_json(path, content)
    print(table([done[period] for period in arguments.periods]))


if __name__ == "__main__":
    main()
