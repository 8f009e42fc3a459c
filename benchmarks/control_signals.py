"""What a control program leaves behind when it is ended by a signal: SIGTERM and SIGHUP, 50 times each, with default settings.

    python benchmarks/control_signals.py               # signals that are missing; writes the JSON
    python benchmarks/control_signals.py --again       # all of them

Each time a program of its own drives a robot with a shipped policy as docs/deploy.md shows, and is sent the signal at a
random moment. The robot is on the other side of a pipe: it keeps what it was sent last. That must be the safe action;
the program must have closed the robot, written its telemetry and ended by itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.deployed import DeployedSampler
from flowpolicy.control.config import ControlConfig
from flowpolicy.control.inference import Inference, build_worker
from flowpolicy.control.inference_hosts import PRELOAD, Build
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.policy_inference import InferenceBuilder
from flowpolicy.control.robot import RobotSpec
from flowpolicy.control.run_config import RunConfig
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.runs.worker_process import process_context

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = "benchmarks/checkpoints/hopper-shortcut-seed0"
RESULTS = ROOT / "benchmarks" / "results" / "control-signals.json"
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
PROGRAMS = 50
TOGETHER = 2
END_S = 30.0


class PipedRobot:
    """A robot whose commands go through a pipe; it rests in the middle of its bounds."""

    def __init__(self, policy: FlowPolicy, pipe: Connection) -> None:
        bound = np.ones(policy.spec.action_dim, np.float32)
        self.spec = RobotSpec("piped", dict(policy.spec.observation_shapes), -bound, bound, 125.0, "zero")
        self.pipe = pipe

    def observe(self) -> dict[str, Any]:
        shown = {key: np.zeros(shape, np.float32) for key, shape in self.spec.observation_shapes.items()}
        return {**shown, "timestamp": time.monotonic()}

    def act(self, action: np.ndarray) -> None:
        self.pipe.send(action.tolist())

    def close(self) -> None:
        self.pipe.send("closed")


def program(build: Build, pipe: Connection, folder: str) -> None:
    """A control program, as docs/deploy.md shows one."""
    policy = FlowPolicy.load(ROOT / CHECKPOINT)
    robot = PipedRobot(policy, pipe)
    worker = build_worker(RunConfig.inference, build)
    loop = ControlLoop(robot, policy, worker, ControlConfig())
    try:
        loop.run()
    finally:
        robot.close()
        worker.close()
        loop.telemetry.write(Path(folder))


def end_one(number: signal.Signals, seed: int, build: Build) -> list[str]:
    """Run a program, send it the signal while it moves the robot; what is wrong with what it left."""
    delay = np.random.default_rng(seed).uniform(0.0, 0.5)
    context = process_context(*PRELOAD)
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=program, args=(build, theirs, folder))
        process.start()
        theirs.close()
        commands, closed, sent_at = [], False, None
        moved: float | None = None
        try:
            while ours.poll(END_S):
                message = ours.recv()
                closed = message == "closed"
                if not closed:
                    commands.append(message)
                    moved = moved or (time.monotonic() if any(message) else None)
                if sent_at is None and moved is not None and time.monotonic() >= moved + delay:
                    os.kill(process.pid, number)
                    sent_at = time.monotonic()
        except EOFError:
            pass
        process.join(END_S)
        ended = process.exitcode is not None
        process.kill()
        written = any(Path(folder).iterdir())
    return [
        text
        for bad, text in (
            (sent_at is None, "the signal was never sent"),
            (not commands or any(commands[-1]), "the last command was not the safe action"),
            (not closed, "the robot was not closed"),
            (not written, "no telemetry was written"),
            (not ended, "it did not end"),
        )
        if bad
    ]


def run_signal(number: signal.Signals, build: Build) -> dict[str, Any]:
    """All programs of a signal."""
    started = time.monotonic()
    with ThreadPoolExecutor(TOGETHER) as pool:
        found = list(pool.map(lambda seed: end_one(number, seed, build), range(PROGRAMS)))
    problems: dict[str, int] = {}
    for text in (text for texts in found for text in texts):
        problems[text] = problems.get(text, 0) + 1
    return {
        "signal": number.name,
        "programs": PROGRAMS,
        "safe": sum(not texts for texts in found),
        "problems": problems,
        "seconds": time.monotonic() - started,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| signal | programs | ended safely | problems |", "|" + " --- |" * 4]
    for row in rows:
        said = "; ".join(f"{text} ({count})" for text, count in row["problems"].items()) or "none"
        lines.append(f"| {row['signal']} | {row['programs']} | {row['safe']} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", action="store_true", help="also signals that were measured before")
    arguments = parser.parse_args()
    rows = {row["signal"]: row for row in read_json(RESULTS)["rows"]} if RESULTS.exists() else {}
    inference: Inference = InferenceBuilder(
        DeployedSampler(checkpoint=str(ROOT / CHECKPOINT))
    )()  # exports once for all
    for number in SIGNALS:
        if arguments.again or number.name not in rows:
            rows[number.name] = run_signal(number, inference.again)
            write_json(RESULTS, {
                "command": "python benchmarks/control_signals.py", "checkpoint": CHECKPOINT,
                "settings": "all defaults", "rows": list(rows.values()), "machine": machine(),
                "versions": versions(), "git_commit": git_state()[0],
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            })  # fmt: skip
    print(table(list(rows.values())))
    if any(row["problems"] for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
