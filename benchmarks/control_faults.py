"""What a control loop does when everything around it fails: thousands of injected faults, every command checked.

    python benchmarks/control_faults.py               # all kinds, those that are missing; writes the JSON
    python benchmarks/control_faults.py --only nan    # kinds whose name contains this text

A recorded trace of Hopper observations is driven by a shipped policy with the default settings of loop, sampler and
worker; only the rate is raised to 500 Hz, and where processes are lost it is Hopper's own. Each kind of fault is injected
at random ticks until it has happened 1,000 times (processes: 50). The robot checks what it is sent: a command that is
not finite or beyond its bounds ends the benchmark. From the telemetry it is checked that every tick sent something
valid: a sampled action, or the safe action within one tick of the last sampled one; and the loop must go on to the end.
What programs do that are told to end is in `control_signals.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.deployed import DeployedSampler
from flowpolicy.acceleration.sampler import fastest_backend
from flowpolicy.control.config import ControlConfig
from flowpolicy.control.events import Event, name_of
from flowpolicy.control.inference import SPARES, Answer, Inference, Worker, build_worker
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.policy_inference import InferenceBuilder
from flowpolicy.control.robot import RobotError
from flowpolicy.control.robots.trace import TraceRobot
from flowpolicy.control.run_config import RunConfig
from flowpolicy.control.system import MonotonicClock
from flowpolicy.control.telemetry import SAFE
from flowpolicy.data.store import read_demonstrations
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = "benchmarks/checkpoints/hopper-shortcut-seed0"
STORE = "pkg://flowpolicy_envs/assets/hopper-medium.zarr.zip"
FAST_HZ, OWN_HZ = 500.0, 125.0
EVENTS, KILLS = 1000, 50
SHARE = 0.25  # of the ticks, or of the chunks, at which a fault is injected
CALM_S = 0.5  # at least, between the loss of one process and of the next; spares are built anew meanwhile


class Injector:
    """Decides when a fault happens, and counts."""

    def __init__(self, seed: int, wanted: int) -> None:
        self.random = np.random.default_rng(seed)
        self.wanted, self.count = wanted, 0

    def __call__(self, share: float = SHARE) -> bool:
        happens = self.count < self.wanted and self.random.random() < share
        self.count += happens
        return happens


class FaultyClock:
    """The monotonic clock with an offset that jumps."""

    def __init__(self) -> None:
        self.offset, self.real = 0.0, MonotonicClock()

    def now(self) -> float:
        return self.real.now() + self.offset

    def sleep_until(self, moment: float) -> None:
        self.real.sleep_until(moment - self.offset)


class Robot:
    """A trace that checks its commands and whose calls can be made to fail."""

    def __init__(self, policy: FlowPolicy, clock: FaultyClock, rate_hz: float) -> None:
        demos = read_demonstrations(STORE, policy.spec.observation_shapes)
        self.trace = TraceRobot(
            {"observation": demos.arrays["observation"]}, np.array([demos.num_steps]), demos.arrays["action"],
            rate_hz, "zero", clock=clock,
        )  # fmt: skip
        self.spec = dataclasses.replace(self.trace.spec, origin=None)
        self.on_observe: Callable[[dict[str, Any]], Any] = lambda observation: observation
        self.on_act: Callable[[], None] = lambda: None
        self.commands = 0

    def observe(self) -> Any:
        return self.on_observe(dict(self.trace.observe()))

    def act(self, action: np.ndarray) -> None:
        ok = action.shape == (3,) and np.isfinite(action).all()
        ok = ok and bool(((self.spec.action_low <= action) & (action <= self.spec.action_high)).all())
        if not ok:
            raise SystemExit(f"The robot was sent {action}: the gate leaks.")
        self.commands += 1
        self.on_act()

    def close(self) -> None:
        self.trace.close()


class Faulty:
    """A worker whose answers pass through ``fault``; None swallows them, as a hang would."""

    def __init__(self, worker: Worker, fault: Callable[[Answer], Answer | None]) -> None:
        self.worker, self.fault, self.hangs = worker, fault, False
        self.submit, self.ready, self.close = worker.submit, worker.ready, worker.close

    def poll(self, timeout: float = 0.0) -> Answer | None:
        answer = None if self.hangs else self.worker.poll(timeout)
        if answer is not None:
            answer = self.fault(answer)
            self.hangs = answer is None
        return answer

    def restart(self) -> None:
        if not self.hangs:  # it did so by itself
            self.worker.restart()
        self.hangs = False


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault: how it is injected, and the event that it must be counted as."""

    name: str
    event: Event
    inject: Callable[[Injector, Robot, FaultyClock, dict[str, Any]], Callable[[Answer], Answer | None]]
    wanted: int = EVENTS
    rate_hz: float = FAST_HZ


def _answers(change: Callable[[Answer], Answer | None]) -> Any:
    """Injects into answers."""

    def inject(injector: Injector, robot: Robot, clock: FaultyClock, state: dict[str, Any]) -> Any:
        return lambda answer: change(answer) if injector() else answer

    return inject


def _hangs(injector: Injector, robot: Robot, clock: FaultyClock, state: dict[str, Any]) -> Any:
    """Swallows answers, two in a row at most: a policy that never answers is the watchdog's."""
    in_a_row = 0

    def fault(answer: Answer) -> Answer | None:
        nonlocal in_a_row
        in_a_row = in_a_row + 1 if in_a_row < 2 and injector() else 0
        return None if in_a_row else answer

    return fault


def _with_actions(make: Callable[[np.ndarray], np.ndarray]) -> Any:
    return _answers(lambda answer: dataclasses.replace(answer, actions=make(np.array(answer.actions))))


def _one(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(actions: np.ndarray) -> np.ndarray:
        actions[len(actions) // 2, 0] = value
        return actions

    return change


def _observations(change: Callable[[dict[str, Any]], Any]) -> Any:
    """Injects into observations."""

    def inject(injector: Injector, robot: Robot, clock: FaultyClock, state: dict[str, Any]) -> Any:
        robot.on_observe = lambda observation: change(observation) if injector() else observation
        return lambda answer: answer

    return inject


def _stale(observation: dict[str, Any]) -> dict[str, Any]:
    return {**observation, "timestamp": observation["timestamp"] - 10.0}


def _raise(error: Exception) -> Any:
    raise error


def _act_raises(injector: Injector, robot: Robot, clock: FaultyClock, state: dict[str, Any]) -> Any:
    robot.on_act = lambda: _raise(RobotError("cable")) if injector() else None
    return lambda answer: answer


def _clock_steps(injector: Injector, robot: Robot, clock: FaultyClock, state: dict[str, Any]) -> Any:
    def act() -> None:
        if injector(0.1):
            clock.offset += injector.random.choice([-1, 1]) * injector.random.uniform(1.5, 20.0)

    robot.on_act = act
    return lambda answer: answer


def _loses(number: signal.Signals, at_once: int = 1) -> Any:
    """Sends the process a signal, and ``at_once`` - 1 of its successors after their first answer."""

    def inject(injector: Injector, robot: Robot, clock: FaultyClock, state: dict[str, Any]) -> Any:
        lost: list[float] = []

        def fault(answer: Answer) -> Answer:
            now = time.monotonic()
            calm = not lost or now - lost[-1] >= CALM_S
            due = len(lost) % at_once > 0 or (calm and state["worker"].waiting == SPARES)
            if due and injector(1.0):
                os.kill(state["worker"].pid, number)
                lost.append(now)
            return answer

        return fault

    return inject


KINDS = (
    Kind("nan actions", Event.ACTION_INVALID, _with_actions(_one(float("nan")))),
    Kind("infinite actions", Event.ACTION_INVALID, _with_actions(_one(float("inf")))),
    Kind("wrong-shape actions", Event.ACTION_INVALID, _with_actions(lambda actions: actions[:, :2])),
    Kind("actions out of bounds", Event.LIMIT_BOUNDS, _with_actions(lambda actions: actions * 100)),
    Kind("inference raises", Event.INFERENCE_ERROR, _answers(
        lambda answer: dataclasses.replace(answer, actions=None, error="RuntimeError: injected"))),
    Kind("inference hangs", Event.INFERENCE_HANG, _hangs),
    Kind("dropped observations", Event.OBSERVATION_MISSING, _observations(lambda observation: {})),
    Kind("nan observations", Event.OBSERVATION_INVALID, _observations(
        lambda observation: {**observation, "observation": observation["observation"] * np.nan})),
    Kind("stale observations", Event.OBSERVATION_STALE, _observations(_stale)),
    Kind("observing raises", Event.ROBOT_ERROR, _observations(lambda observation: _raise(RobotError("bus")))),
    Kind("commanding raises", Event.ROBOT_ERROR, _act_raises),
    Kind("clock steps", Event.CLOCK_STEP, _clock_steps),
    Kind("inference processes killed", Event.INFERENCE_DIED, _loses(signal.SIGKILL), KILLS, OWN_HZ),
    Kind("inference processes killed, then their successors", Event.INFERENCE_DIED, _loses(signal.SIGKILL, 2),
         KILLS, OWN_HZ),
    Kind("inference processes stopped", Event.INFERENCE_HANG, _loses(signal.SIGSTOP), KILLS, OWN_HZ),
)  # fmt: skip


def run_kind(kind: Kind, build: Callable[[], Inference]) -> dict[str, Any]:
    """Inject until the faults have happened, and check what was sent."""
    policy = FlowPolicy.load(ROOT / CHECKPOINT)
    clock = FaultyClock()
    robot = Robot(policy, clock, kind.rate_hz)
    injector, state = Injector(0, kind.wanted), {}
    state["worker"] = inner = build_worker(RunConfig.inference, build)
    worker = Faulty(inner, kind.inject(injector, robot, clock, state))
    loop = ControlLoop(robot, policy, worker, ControlConfig(), clock=clock)
    started = time.monotonic()

    def watch() -> None:
        while injector.count < kind.wanted and not loop.status.stopped and time.monotonic() - started < 900:
            time.sleep(0.05)
        until = time.monotonic() + 30
        while loop.status.misses and not loop.status.stopped and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1.0)
        if not loop.status.stopped:
            loop.stop("finished")

    threading.Thread(target=watch, daemon=True).start()
    status = loop.run()
    worker.close()
    return _checked(kind, loop, robot, injector, status.stopped) | {
        "seconds": time.monotonic() - started,
        "stopped": status.stopped,
    }


def _checked(kind: Kind, loop: ControlLoop, robot: Robot, injector: Injector, stopped: str) -> dict[str, Any]:
    rows = loop.telemetry.rows()
    counts = loop.events.counts
    sent = ~np.isnan(rows["action"]).any(axis=1)
    safe = rows["source"] == SAFE
    silent = int((~sent).sum()) - (counts[Event.ROBOT_ERROR] if kind.name == "commanding raises" else 0)
    wrong_safe = int((rows["action"][safe & sent] != 0).any(axis=1).sum())
    recovered = bool((~safe[-100:]).mean() > 0.5)
    problems = [
        text
        for bad, text in (
            (injector.count < kind.wanted, f"only {injector.count} faults were injected"),
            (counts[kind.event] < injector.count, f"only {counts[kind.event]} were counted"),
            (silent > 0, f"{silent} ticks sent nothing"),
            (wrong_safe > 0, f"{wrong_safe} safe actions were not the safe action"),
            (not recovered, "it did not recover"),
            (stopped != "finished", stopped),
        )
        if bad
    ]
    return {
        "kind": kind.name,
        "rate_hz": kind.rate_hz,
        "injected": injector.count,
        "event": name_of(kind.event),
        "events": {name_of(event): count for event, count in sorted(counts.items())},
        "ticks": len(rows),
        "commands": robot.commands,
        "safe_ticks": int(safe.sum()),
        "longest_gap_ticks": int(np.diff(rows["tick"]).max()),
        "problems": problems,
        "records": loop.events.content()["records"][:5],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| fault | injected | counted as | commands checked | safe ticks | problems |",
        "|" + " --- |" * 6,
    ]
    for row in rows:
        counted = f"{row['event']}: {row['events'].get(row['event'], 0)}"
        problems = "; ".join(row["problems"]) or "none"
        cells = [row["kind"], row["injected"], counted, row["commands"], row["safe_ticks"], problems]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="kinds whose name contains this text")
    parser.add_argument("--again", action="store_true", help="also those that were measured before")
    arguments = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "control-faults.json"
    stored = {row["kind"]: row for row in read_json(path)["rows"]} if path.exists() else {}
    rows = {
        kind.name: row for kind in KINDS if (row := stored.get(kind.name, {})).get("rate_hz") == kind.rate_hz
    }
    # Exported once; each process of each kind is built from that.
    build = InferenceBuilder(DeployedSampler(checkpoint=str(ROOT / CHECKPOINT)))().again
    assert build is not None
    for kind in KINDS:
        if arguments.only in kind.name and (arguments.again or kind.name not in rows):
            rows[kind.name] = run_kind(kind, build)
            print(table([rows[kind.name]]).splitlines()[-1], flush=True)
            ordered = [rows[kind.name] for kind in KINDS if kind.name in rows]
            content = {
                "command": "python benchmarks/control_faults.py", "checkpoint": CHECKPOINT,
                "settings": "all defaults, backend " + fastest_backend(torch.device("cpu")), "rows": ordered, "complete": len(ordered) == len(KINDS), "machine": machine(),
                "versions": versions(), "git_commit": git_state()[0],
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }  # fmt: skip
            write_json(path, content)
    print(table([rows[kind.name] for kind in KINDS if kind.name in rows]))
    if any(row["problems"] for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
