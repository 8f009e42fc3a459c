"""Random sequences of everything that happens to a control loop, and the properties that must hold of each.

A sequence is a robot with a random safe action and random limits, driven by the gate alone or by the whole
loop on a clock of its own, while commands, chunks, observations, the dead-man switch, the worker, the clock
and the robot itself fail at random, and an operator takes over, gives back, pauses and ends episodes. What
the robot got is judged, who was in command, and which actions of which chunk it was.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import numpy as np
from control_toys import A, ToyClock, ToyPolicy, ToyRobot, ToyWorker, died

from flowpolicy.control import loop as loop_module
from flowpolicy.control.config import ControlConfig
from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.operator import Intervention
from flowpolicy.control.robot import RobotError
from flowpolicy.control.safety import SafetyConfig, SafetyGate
from flowpolicy.control.system import DriverWatch
from flowpolicy.control.telemetry import OPERATOR, SAFE

RATE_HZ = 100.0
SAFE_ACTIONS = ("hold", "zero", "numbers")
ROUNDING = 4 * float(np.finfo(np.float32).eps)
BROKEN = (
    None, {}, [1, 2], np.zeros(3), "text", {"observation": None}, {"observation": np.full(3, np.nan)},
    {"observation": np.zeros(4)}, {"observation": np.zeros(3), "timestamp": None},
    {"observation": np.zeros(3), "timestamp": float("nan")},
    {"observation": np.zeros(3), "episode": np.ones(2)},
)  # fmt: skip


class Recorder(ToyRobot):
    """Keeps what it got and whether that was its safe action; may raise before it has it, or after."""

    def __init__(self, random, safe_action, bound):
        super().__init__(ToyClock(), rate_hz=RATE_HZ, safe_action=safe_action, bound=bound)
        self.random, self.fail, self.is_safe = random, 0.0, False
        self.segments = [[]]  # a safe action begins one, and so does a rest without a command
        self.executed, self.raised = 0, False
        self.on_act = self.before = lambda: None

    def watch(self, gate):
        send_safe = gate._send_safe

        def flagged(tick):
            self.is_safe, before = True, sum(map(len, self.segments))
            self.raised = False
            try:
                sent = send_safe(tick)
            finally:
                self.is_safe = False
            if sent is None and not self.raised and before:  # nothing to hold: it stands still
                self.segments.append(self.segments[-1][-1:])
            return sent

        gate._send_safe = flagged

    def act(self, action):
        self.before()
        self.raised = True
        luck = self.random.random()
        if luck < self.fail / 2:
            self.segments.append(self.segments[-1][-1:])
            raise RobotError("busy", unsent=True)
        if luck < self.fail:
            raise OSError("cable")
        if self.is_safe:
            self.segments.append([])
        self.segments[-1].append(np.array(action))
        if self.random.random() < self.fail:
            raise OSError("answer lost")
        self.raised = False
        self.executed += not self.is_safe


def draw_robot(random):
    bound = float(10 ** random.uniform(-1, 2))
    kind = SAFE_ACTIONS[random.integers(3)]
    safe = tuple(random.uniform(-bound, bound, A)) if kind == "numbers" else kind
    safety = SafetyConfig(
        velocity_limit=None if random.random() < 0.3 else float(bound * 10 ** random.uniform(-1, 2.5)),
        jerk_limit=None if random.random() < 0.5 else float(bound * 10 ** random.uniform(1, 6.5)),
        max_observation_age_s=0.035, miss_limit=int(random.choice([10, 10**6])),
    )  # fmt: skip
    return Recorder(random, safe, bound), safety


class RandomOperator:
    """Commands for a while, wildly or gently, and sometimes fails, pauses, or ends the episode."""

    name = "random"

    def __init__(self, random, robot, trouble):
        self.random, self.robot, self.trouble = random, robot, trouble
        self.bound = float(robot.spec.action_high[0])
        self.commanded, self.taken = set(), []  # ticks; commands executed before each take-over
        self.commands = False

    def start(self, spec, period):
        self.is_open = True

    def read(self, moment):
        if self.random.random() < self.trouble / 3:
            raise OSError("unplugged")
        if self.random.random() < self.trouble:
            return Intervention(pause=True)
        if self.random.random() < 0.05:
            return Intervention(success=bool(self.random.integers(2)))
        if self.random.random() < 0.2:
            self.commands = not self.commands
        last = np.zeros(A, np.float32) if moment.sent is None else moment.sent
        action = draw_command(self.random, last, self.bound) if self.commands else None
        if action is None:
            return Intervention()
        if action.shape != (A,):
            return Intervention(action)  # counts as an operator who cannot be heard
        self.commanded.add(moment.tick)
        self.taken.append((moment.tick, self.robot.executed))
        return Intervention(action)

    def close(self):
        self.is_open = False


def draw_command(random, last, bound):
    """Wild, gently moving, on the bounds, or not a command."""
    kind = random.integers(8)
    if kind == 0:
        return None
    if kind == 1:
        return np.full(A, random.choice([np.nan, np.inf, -np.inf]), np.float32)
    if kind == 2:
        return np.zeros(A + 1, np.float32)
    if kind == 3:
        return random.uniform(-3 * bound, 3 * bound, A).astype(np.float32)
    if kind == 4:
        return (bound * random.choice([-1.0, 1.0], A)).astype(np.float32)
    return (last + random.normal(0, 0.02 * bound, A)).astype(np.float32)


def drive_gate(random, robot, safety, length):
    held = {"now": True}
    gate = SafetyGate(robot, safety, EventLog(), 1 / RATE_HZ, lambda: held["now"] or 1 / 0)
    robot.watch(gate)
    last = np.zeros(A, np.float32)
    trouble = random.choice([0.0, 0.05, 0.3])
    robot.fail = 0.5 * trouble
    for tick in range(length):
        held["now"] = random.random() >= trouble
        if random.random() < trouble / 4:
            gate.forget_hold()
        command = draw_command(random, last, float(robot.spec.action_high[0]))
        if command is not None and command.shape == (A,) and np.isfinite(command).all():
            last = command
        gate.send(command, tick)


def drive_loop(random, robot, safety, length):
    bound = float(robot.spec.action_high[0])
    trouble = {name: float(random.choice([0.0, 0.0, 0.05, 0.3])) for name in (
        "observe", "stale", "episode", "dead man", "answer", "clock", "late", "act")}  # fmt: skip
    happens = lambda name: random.random() < trouble[name]  # noqa: E731
    world = {"episode": 0}
    ends_at = int(random.integers(length)) if random.random() < 0.1 else -1

    def plan(request):
        start = random.uniform(-1.5, 1.5, A) * bound
        path = start + np.cumsum(random.normal(0, 0.02 * bound, (8, A)), axis=0)
        return path.astype(np.float32)

    def observe(observation):
        if happens("observe"):
            return BROKEN[random.integers(len(BROKEN))]
        if happens("episode"):
            world["episode"] += 1
        old = 0.05 * happens("stale")
        return {**observation, "timestamp": observation["timestamp"] - old, "episode": world["episode"]}

    def before():
        if happens("late"):
            robot.clock.time += random.uniform(0, 0.05)
        if happens("clock") and random.random() < 0.2:
            robot.clock.time += random.choice([-5.0, 3.0])
        if loop.status.tick == ends_at:
            signal.raise_signal(random.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT]))

    def answered(answer):
        if not happens("answer"):
            return answer
        kind = random.integers(5)
        if kind == 0:
            return None
        if kind == 1:
            return died(answer)
        broken = (None, np.full((8, A), np.nan, np.float32), np.zeros((3, A), np.float32))
        return replace(answer, actions=broken[kind - 2], error="RuntimeError: no")

    robot.on_observe, robot.before, robot.fail = observe, before, 0.3 * trouble["act"]
    workers = [ToyWorker(int(random.integers(6)), plan) for _ in range(2)]
    for worker in workers:
        worker.fault = answered
    config = ControlConfig(
        fusion=str(random.choice(["switch", "ensemble", "rtc"])), priority=False, execute_horizon=4,
        wait_share=float(random.choice([0.0, 0.3])), hang_timeout_s=0.05, safety=safety,
        telemetry_ticks=64,
    )  # fmt: skip
    fast = workers[1] if random.random() < 0.3 else None
    operator = RandomOperator(random, robot, float(random.choice([0.0, 0.1])))
    if random.random() < 0.5:
        robot.end_episode = lambda: world.update(episode=world["episode"] + 1)
    loop = ControlLoop(
        robot, ToyPolicy(), workers[0], config, fast=fast, clock=robot.clock,
        dead_man=lambda: not happens("dead man"), operator=operator if random.random() < 0.5 else None,
    )  # fmt: skip
    robot.watch(loop.gate)
    starts, executed = watch_chunks(loop, robot)
    status = loop.run(length)
    assert status.stopped
    if ends_at >= 0 and status.signal:
        assert status.tick >= ends_at
    judge_steps(loop, robot, starts, executed)
    judge_operator(loop, operator, starts)
    last = robot.segments[-1]
    if not robot.raised and robot.spec.safe_action != "hold":
        assert len(last) == 1, "the last command is no safe action"
        safe = 0.0 if robot.spec.safe_action == "zero" else np.asarray(robot.spec.safe_action, np.float32)
        assert np.array_equal(last[0], np.broadcast_to(safe, A))


def watch_chunks(loop, robot):
    """Where each chunk began, by its number, in commands that the robot has taken; and these by tick."""
    starts, executed, asked = {}, {}, {}
    submit, add, observe = loop.chunks.main.submit, loop.chunks.fusion.add, loop._observe

    def submitted(step, observation, prefix):
        assert step == robot.executed, f"asked at step {step} after {robot.executed} executed actions"
        asked["start"] = step
        submit(step, observation, prefix)

    def added(chunk):
        assert chunk.start == asked["start"]
        assert chunk.arrived == robot.executed
        starts[len(starts) + 1] = chunk.start
        add(chunk)

    def observed(tick, now):
        executed[tick] = robot.executed
        observe(tick, now)

    loop.chunks.main.submit, loop.chunks.fusion.add, loop._observe = submitted, added, observed
    return starts, executed


def judge_steps(loop, robot, starts, executed):
    """Every command was its chunk's action of the number of actions executed since it began."""
    assert loop.status.steps == robot.executed
    for row in loop.telemetry.rows():
        number = int(row["chunk"])
        if row["source"] != SAFE and number != -1:
            start = starts[number] if number >= 0 else -2 - number
            assert int(row["chunk_step"]) == executed[int(row["tick"])] - start


def judge_operator(loop, operator, starts):
    """Nobody else commands while the operator does, and no chunk from before a take-over is used after it."""
    before = -1
    taken = dict(operator.taken)
    for row in loop.telemetry.rows():
        tick, source, number = int(row["tick"]), int(row["source"]), int(row["chunk"])
        if tick in operator.commanded:
            assert source in (OPERATOR, SAFE)
            if int(row["events"]) >> Event.TAKE_OVER & 1:
                before = taken[tick]
        else:
            assert source != OPERATOR
            if source != SAFE and number >= 0:
                assert starts[number] >= before, "a chunk from before the take-over"
    assert not operator.commanded or not operator.is_open


def judge_commands(robot, safety):
    """Everything that the robot got was finite and within bounds, velocity and jerk."""
    bound = float(robot.spec.action_high[0])
    rounding = ROUNDING * bound
    for segment in robot.segments:
        if not segment:
            continue
        path = np.array(segment, np.float64)
        assert path.shape[1:] == (A,)
        assert np.isfinite(path).all()
        assert np.abs(path).max() <= bound
        rest = np.concatenate([path[:1], path[:1], path])  # it stood still where a safe action put it
        if safety.velocity_limit is not None:
            assert np.abs(np.diff(rest, axis=0)).max() <= safety.velocity_limit / RATE_HZ + rounding, (
                "velocity"
            )
        if safety.jerk_limit is not None and len(rest) > 3:
            assert np.abs(np.diff(rest, n=3, axis=0)).max() <= safety.jerk_limit / RATE_HZ**3 + rounding, (
                "jerk"
            )


def run_sequence(seed: int, length: int = 25) -> None:
    """One sequence.

    Raises:
        AssertionError: a property does not hold; the message says of which seed.
    """
    random = np.random.default_rng(seed)
    robot, safety = draw_robot(random)
    drive = drive_gate if random.random() < 0.3 else drive_loop
    try:
        drive(random, robot, safety, length)
        judge_commands(robot, safety)
    except AssertionError as error:
        raise AssertionError(f"sequence {seed}: {error}") from error


@contextmanager
def _only_errors_logged() -> Iterator[None]:
    """Every fault is a warning, and there are thousands."""
    logger = logging.getLogger("flowpolicy")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run_sequences(first: int, count: int) -> list[str]:
    """What does not hold, a sentence for each sequence."""
    failures = []
    # A full collection and a thread at the start of every run take longer than the run.
    with (
        _only_errors_logged(),
        mock.patch.object(loop_module, "without_collection", nullcontext),
        mock.patch.object(DriverWatch, "watching", return_value=nullcontext()),
    ):
        for seed in range(first, first + count):
            try:
                run_sequence(seed)
            except AssertionError as error:
                failures.append(str(error))
    return failures
