"""How punctual the control loop is: 60,000 ticks at 100 Hz beside a simulator and a policy, idle and under load.

    python benchmarks/control_timing.py               # the arms that are missing; writes the JSON and the plot
    python benchmarks/control_timing.py --only idle   # arms whose name contains this text

AdroitHandDoor runs in its own process at its native 100 Hz and the policy runs in another (or in a thread). Arms:
idle; with a process that spins on every core; the same without real-time priority; inference in a thread. Every tick
that did not happen is counted. The last arm has no inference at all: what the loop itself costs; a shared machine's
speed changes by the minute, so that this arm is several runs, of which the one with the median work is shown.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.deployed import DeployedSampler
from flowpolicy.control.config import ControlConfig
from flowpolicy.control.inference import Answer, Request, build_worker
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.policy_inference import InferenceBuilder
from flowpolicy.control.robots.simulated import SimulatedRobot
from flowpolicy.control.safety import SafetyConfig
from flowpolicy.control.statistics import run_statistics
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import task_from
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.plots.figure import BLUE, GREEN, GREY, ORANGE, house_figure

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = "benchmarks/checkpoints/adroit_door-reinflow-seed0"


@dataclass(frozen=True)
class Arm:
    """One way of running."""

    name: str
    ticks: int
    hog: bool = False
    priority: bool = True
    inference: str = "process"
    runs: int = 1


ARMS = (
    Arm("idle", 60_000),
    Arm("idle, no priority", 12_000, priority=False),
    Arm("idle, inference in a thread", 12_000, inference="thread"),
    Arm("hog", 12_000, hog=True),
    Arm("hog, no priority", 12_000, hog=True, priority=False),
    Arm("hog, inference in a thread", 12_000, hog=True, inference="thread"),
    Arm("no inference", 1_500, inference="none", runs=9),
)


class NoInference:
    """Answers at once with zeros, in the loop's own thread: what is left is the loop."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.actions, self.request = np.zeros(shape, np.float32), None

    def submit(self, request: Request) -> None:
        self.request = request

    def poll(self, timeout: float = 0.0) -> Answer | None:
        request, self.request = self.request, None
        return None if request is None else Answer(request.step, self.actions, 0.0)

    def ready(self, timeout: float = 0.0) -> bool:
        return True

    def restart(self) -> None:
        self.request = None

    def close(self) -> None:
        pass


def _spin() -> None:
    while True:
        pass


@contextmanager
def hogs(wanted: bool) -> Iterator[None]:
    """A process on every core that never sleeps."""
    count = (os.cpu_count() or 1) if wanted else 0
    running = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(count)]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def run_arm(arm: Arm, ticks: int) -> dict[str, Any]:
    """The run with the median work of a tick, and the medians of all."""
    runs = sorted((drive(arm, ticks) for _ in range(arm.runs)), key=work)
    return runs[len(runs) // 2] | {"work_us_p50_of_runs": [work(run) for run in runs]}


def work(row: dict[str, Any]) -> float:
    """Median microseconds of a tick's work."""
    return float(row["statistics"]["work_us"]["p50"])


def drive(arm: Arm, ticks: int) -> dict[str, Any]:
    """Drive, and keep what the telemetry says."""
    with initialize_config_module("flowpolicy_configs", version_base="1.3"):
        env = OmegaConf.to_container(compose("pretrain", overrides=["env=adroit_door"]).env, resolve=True)
    policy, task = FlowPolicy.load(ROOT / CHECKPOINT), task_from(env)
    robot = SimulatedRobot(task, seed=7_000_000)
    if arm.inference == "none":
        worker: Any = NoInference((policy.spec.action_horizon, policy.spec.action_dim))
    else:
        worker = build_worker(
            arm.inference, InferenceBuilder(DeployedSampler(checkpoint=str(ROOT / CHECKPOINT)))
        )
    config = ControlConfig(priority=arm.priority, safety=SafetyConfig(miss_limit=10**9))
    loop = ControlLoop(robot, policy, worker, config)
    load = os.getloadavg()[0]
    try:
        with hogs(arm.hog):
            status = loop.run(ticks)
    finally:
        worker.close()
        robot.close()
    world, columns = robot.report(), loop.telemetry.columns()
    assert world is not None
    late = 1e3 * (columns["started"] - columns["deadline"])
    grid = columns["deadline"] - columns["tick"] * loop.period
    return {
        "arm": arm.name,
        "ticks": int(status.tick) + 1,
        "load_before": load,
        "statistics": run_statistics(columns, loop.period),
        "deadline_grid_drift_s": float(grid[-1] - grid[0]),
        "events": loop.events.content()["counts"],
        "jitter_ms_histogram": np.histogram(late, np.geomspace(1e-3, 1e3, 121))[0].tolist(),
        "world": {"steps": world.steps, "late_steps": world.late_steps, "unheard_steps": world.unheard_steps,
                  "episodes": world.finished, "success": float(np.mean(world.success[: world.finished]))},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| arm | ticks | not begun in time | jitter ms p50 | p99 | p99.9 | max | safe ticks | work us p50 | p99 |",
        "|" + " --- |" * 10,
    ]
    for row in rows:
        jitter, work = row["statistics"]["jitter_ms"], row["statistics"]["work_us"]
        cells = [row["arm"], row["ticks"], row["events"].get("deadline missed", 0)]
        cells += [f"{jitter[name]:.3f}" for name in ("p50", "p99", "p99_9", "max")]
        cells += [row["events"].get("safe action", 0), f"{work['p50']:.0f}", f"{work['p99']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of ticks later than a time, by arm."""
    edges = np.geomspace(1e-3, 1e3, 121)
    styles = {"idle": BLUE, "idle, no priority": GREEN, "hog": ORANGE, "hog, no priority": GREY}
    with house_figure(path, columns=1, width=6.4, height=3.8) as (_, axes):
        for row in rows:
            if row["arm"] in styles:
                counts = np.array(row["jitter_ms_histogram"], dtype=float)
                later = counts[::-1].cumsum()[::-1] / counts.sum()
                axes[0].step(edges[:-1], later, where="post", label=row["arm"], color=styles[row["arm"]])
        axes[0].set(xscale="log", yscale="log", xlim=(0.02, 100), ylim=(1e-5, 1.2))
        axes[0].set_xlabel("milliseconds after the deadline")
        axes[0].set_ylabel("share of ticks that begin later")
        axes[0].axvline(10, color=GREY, lw=0.8, ls=":")
        axes[0].legend()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="arms whose name contains this text")
    parser.add_argument("--again", action="store_true", help="also those that were measured before")
    parser.add_argument(
        "--ticks", type=int, default=0, help="ticks of each arm, to try it out: nothing is written"
    )
    arguments = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "control-timing.json"
    rows = {row["arm"]: row for row in read_json(path)["rows"]} if path.exists() else {}
    for arm in ARMS:
        if arguments.only not in arm.name or not (arguments.again or arguments.ticks or arm.name not in rows):
            continue
        rows[arm.name] = run_arm(arm, arguments.ticks or arm.ticks)
        print(time.strftime("%H:%M:%S"), table([rows[arm.name]]).splitlines()[-1], flush=True)
        ordered = [rows[arm.name] for arm in ARMS if arm.name in rows]
        content = {
            "command": "python benchmarks/control_timing.py", "checkpoint": CHECKPOINT, "rate_hz": 100.0,
            "rows": ordered, "complete": len(ordered) == len(ARMS), "machine": machine(), "versions": versions(),
            "git_commit": git_state()[0], "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        if not arguments.ticks:
            write_json(path, content)
            plot(ordered, ROOT / "docs" / "images" / "control-timing.png")
    print(table([rows[arm.name] for arm in ARMS if arm.name in rows]))


if __name__ == "__main__":
    main()
