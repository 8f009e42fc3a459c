"""A Gymnasium environment as a robot, which runs in its own process in real time."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.inference_hosts import PRELOAD
from flowpolicy.control.robot import (
    EPISODE,
    SUCCESS,
    TERMINATED,
    TIMESTAMP,
    TOTAL_REWARD,
    Action,
    Observation,
    RobotError,
    RobotSpec,
)
from flowpolicy.control.robots.shared import Mailbox
from flowpolicy.control.system import MonotonicClock
from flowpolicy.errors import ConfigError, FlowPolicyError, TaskError
from flowpolicy.evaluation.episodes import EpisodeRecord, columns
from flowpolicy.evaluation.task import Task
from flowpolicy.execution.rotations import Rotation
from flowpolicy.runs.worker_process import WorkerDiedError, WorkerProcess
from flowpolicy.settings import require

_ENDED = "ended"  # key of a command: the last episode that the operator ended
START_TIMEOUT_S = 60.0
SILENCE_S = 0.05
"""Without a new observation after which the process is looked at."""
KEPT_STEPS = 200_000
"""Steps whose commands are kept for a video; in a longer run the later ones are not."""


@dataclass(frozen=True)
class WorldReport:
    """What a simulated world says of a run.

    Attributes:
        returns: of the episodes, the last one perhaps unfinished.
        lengths: steps of each.
        finished: episodes that came to their end.
        success: of each episode, where the environment says so.
        score: largest of each episode, where the environment says so.
        steps: of the world.
        late_steps: that began more than a period late: the simulator is slower than real time.
        unheard_steps: at which no new command had come since the step before.
        deserted_steps: of these, at which none had come for the heartbeat's time: the safe action.
        seed: of the first episode; each later one has the next.
        commands: of each episode, ``(steps, A)``, as executed.
    """

    returns: list[float]
    lengths: list[int]
    finished: int
    success: list[bool]
    score: list[float]
    steps: int
    late_steps: int
    unheard_steps: int
    deserted_steps: int
    seed: int
    commands: list[NDArray[np.float32]] = field(repr=False, default_factory=list)


class SimulatedRobot:
    """An environment that advances by itself at its own rate and executes the newest command.

    Latency is felt as on a robot: a command that comes late acts late, and where none comes the last one
    goes on. Where none has come for ``heartbeat_s`` (the loop's program was killed, or hangs) the world
    applies the task's safe action by itself until one comes. Between episodes the world waits for the first
    command that answers its new observation.

    Args:
        task: the environment, its rate and its safe action.
        seed: environment seed of the first episode.
        rate_hz: steps per second of real time; None takes the task's own rate.
        heartbeat_s: without a command after which the world is deserted; at least two of the loop's periods.

    Raises:
        ConfigError: the task does not declare a safe action.
        TaskError: the environment cannot be made.
    """

    def __init__(
        self, task: Task, *, seed: int = 0, rate_hz: float | None = None, heartbeat_s: float = 0.5
    ) -> None:
        if not task.safe_action:
            raise ConfigError(
                f"Task '{task.name}' does not say what its safe action is; name the task with env=..., or "
                "add safe_action: hold (position control) or zero (torque, velocity) to its file."
            )
        self.task = task
        rate = task.control_hz if rate_hz is None else rate_hz
        require(rate > 0, "robot.rate_hz", rate, "positive")
        require(heartbeat_s > 0, "heartbeat_s", heartbeat_s, "positive")
        fields, low, high = _spaces(task)
        shapes = {key: shape for key, (shape, _) in fields.items()}
        rotations = Rotation.of(task.rotations)
        spec = RobotSpec(
            task.name, shapes, low, high, rate, task.safe_action, rotations=rotations,
            heartbeat_s=heartbeat_s, is_hardware=False,
        )  # fmt: skip
        told = {
            TIMESTAMP: ((), np.float64), EPISODE: ((), np.int64), SUCCESS: ((), np.int8),
            TERMINATED: ((), np.int8), TOTAL_REWARD: ((), np.float64),
        }  # fmt: skip
        self._observations = Mailbox({**fields, **told})
        self._commands = Mailbox(
            {"action": (low.shape, np.float32), EPISODE: ((), np.int64), _ENDED: ((), np.int64)}
        )
        arguments = (task, seed, rate, heartbeat_s, self._observations, self._commands)
        self._world = WorkerProcess(_serve, arguments, name="world", preload=PRELOAD)
        self._world.start()
        self._episode, self._ended = 0, -1
        self._report: WorldReport | None = None
        origin = self._receive(START_TIMEOUT_S)
        self.spec = replace(spec, origin=origin)

    def observe(self) -> Observation:
        """The newest observation, with its time and episode.

        Raises:
            RobotError: the world's process ended.
        """
        record = self._observations.read()
        # A living world publishes in every period; only a silent one is worth asking the system about.
        silent = record is None or time.monotonic() - record[TIMESTAMP] > SILENCE_S
        if record is None or (silent and not self._world.is_alive()):
            raise RobotError("the simulator's process ended")
        self._episode = int(record[EPISODE])
        return record

    def act(self, action: Action) -> None:
        """Command the world; it executes the newest command at its next step."""
        self._commands.write(action=action, episode=self._episode, ended=self._ended)

    def end_episode(self) -> None:
        """The world begins another episode at its next step."""
        self._ended = self._episode
        held = np.zeros(self.spec.action_dim, np.float32)  # of an episode that has ended
        self._commands.write(action=held, episode=self._episode, ended=self._ended)

    def close(self) -> None:
        """End the world and fetch its report."""
        with suppress(WorkerDiedError, FlowPolicyError):  # it died: there is no report, or not a second one
            self._world.send(None)
            self._report = self._receive(10.0)
        self._world.stop()

    def report(self) -> WorldReport | None:
        """What the world says of the run, after :meth:`close`; None where its process died."""
        return self._report

    def _receive(self, timeout: float) -> Any:
        try:
            message = self._world.receive() if self._world.poll(timeout) else None
        except WorkerDiedError as error:
            raise TaskError("The simulator's process ended while it started.") from error
        if message is None:
            raise TaskError(f"The simulator did not answer within {timeout:g} s.")
        if isinstance(message, str):
            raise TaskError(message)
        return message


def _spaces(task: Task) -> tuple[dict[str, tuple[tuple[int, ...], Any]], Action, Action]:
    """Observation fields and action bounds; made here so that a mistake is found before a process starts."""
    env = task.make()
    try:
        low, high = env.action_space.low, env.action_space.high
        return env.fields, low.astype(np.float32), high.astype(np.float32)
    finally:
        env.close()


def _serve(
    connection: Connection[Any, Any], task: Task, seed: int, rate_hz: float, heartbeat_s: float,
    observations: Mailbox, commands: Mailbox,
) -> None:  # fmt: skip
    """The process: make the environment, then run it until told to stop."""
    try:
        env = task.make()
        world = _World(env, seed, 1.0 / rate_hz, observations, commands, task.safe_action, heartbeat_s)
        connection.send(world.origin)
        while not connection.poll():
            world.advance()
        connection.send(world.report())
        env.close()
    except (ConnectionError, EOFError):  # the loop's process is gone
        return
    except Exception as error:
        connection.send(f"Task '{task.name}': {type(error).__name__}: {error}".splitlines()[0])


class _World:
    """The environment on its own clock."""

    def __init__(
        self, env: Any, seed: int, period: float, observations: Mailbox, commands: Mailbox,
        safe_action: str | tuple[float, ...], heartbeat_s: float,
    ) -> None:  # fmt: skip
        self.env, self.seed, self.period = env, seed, period
        self.observations, self.commands = observations, commands
        self.clock = MonotonicClock()
        self.safe_action, self.heartbeat_s = safe_action, heartbeat_s
        self.episode, self.steps, self.late, self.unheard, self.deserted, self.heard = -1, 0, 0, 0, 0, 0
        self.heard_at = self.clock.now()
        self.total_reward, self.terminated = 0.0, False
        self.records: list[EpisodeRecord] = []
        self.executed: list[list[Action]] = []
        self._begin()
        self.origin = self.clock.now() + period
        self._next = self.origin

    def advance(self) -> None:
        """Wait for the next step's time and take it."""
        self.clock.sleep_until(self._next)
        late = int((self.clock.now() - self._next) / self.period)
        self.late += late
        self._next += (1 + late) * self.period
        command = self.commands.read()
        if command is None or int(command[EPISODE]) != self.episode:
            self._publish()  # still waiting at the start of an episode
            return
        if int(command[_ENDED]) == self.episode:
            self._begin()
            return
        action = self._heard(np.array(command["action"], dtype=self.env.action_space.dtype))
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        self.total_reward += float(reward)
        self.terminated = bool(terminated)
        self.records[-1].add(float(reward), info)
        if self.steps <= KEPT_STEPS:
            self.executed[-1].append(action.astype(np.float32))
        if terminated or truncated:
            self._begin()
        self._publish()

    def _heard(self, action: NDArray[Any]) -> NDArray[Any]:
        """The newest command, or the safe action where it has stood for too long."""
        if self.commands.count != self.heard:
            self.heard, self.heard_at = self.commands.count, self.clock.now()
            return action
        self.unheard += 1
        if self.clock.now() - self.heard_at <= self.heartbeat_s:
            return action
        self.deserted += 1
        if self.safe_action == "hold":
            return action
        return np.full(action.shape, 0 if self.safe_action == "zero" else self.safe_action, action.dtype)

    def report(self) -> WorldReport:
        """Everything so far."""
        episodes = columns(self.records)
        success, score = episodes["success"], episodes["score"]
        return WorldReport(
            [record.ret for record in self.records], [record.length for record in self.records],
            len(self.records) - 1,
            [] if success is None else success.tolist(), [] if score is None else score.tolist(),
            self.steps, self.late, self.unheard, self.deserted, self.seed,
            [np.array(rows, dtype=np.float32) for rows in self.executed],
        )  # fmt: skip

    def _begin(self) -> None:
        self.episode += 1
        success = self.records[-1].success if self.records else None
        self.success = -1 if success is None else int(success)
        self.observation, _ = self.env.reset(seed=self.seed + self.episode)
        self.records.append(EpisodeRecord())
        self.executed.append([])
        self._publish()

    def _publish(self) -> None:
        self.observations.write(
            **self.observation, timestamp=time.monotonic(), episode=self.episode, success=self.success,
            terminated=self.terminated, total_reward=self.total_reward,
        )  # fmt: skip


def record_video(task: Task, report: WorldReport, path: Path, seconds: float = 60.0) -> Path | None:
    """The run's episodes again from their executed commands, as a video in real time.

    A simulator given the same seed and commands does the same again, so that nothing had to be rendered
    while the world ran.

    Args:
        task: of the world.
        report: of the run.
        path: the mp4.
        seconds: of video at most.

    Returns:
        ``path``, or None where nothing can be rendered here (one sentence is logged).
    """
    from flowpolicy.evaluation.video import EpisodeVideo

    video = EpisodeVideo(path, task, f"{task.name}  real time")
    env = video.make()
    left = int(seconds * task.control_hz)
    try:
        for episode, commands in enumerate(report.commands):
            if left <= 0 or not len(commands):
                break
            env.reset(seed=report.seed + episode)
            total = 0.0
            video.capture(env, 0, total)
            for step, command in enumerate(commands[:left], start=1):
                _, reward, *_ = env.step(command)
                total += float(reward)
                video.capture(env, step, total, last=step == len(commands))
            left -= len(commands)
    finally:
        env.close()
        made = video.close()
    return made
