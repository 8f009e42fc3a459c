"""A control run from a checkpoint to a report: build robot and samplers, drive, write what happened."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowpolicy.acceleration.choosing.plan import DeploymentPlan, SamplerChoice
from flowpolicy.control.config import ControlConfig
from flowpolicy.control.inference import SPARES, build_worker
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.planners import PlannerBuilder, SamplerSettings
from flowpolicy.control.report import write_report
from flowpolicy.control.robot import Robot
from flowpolicy.control.robots.simulated import SimulatedRobot, WorldReport, film
from flowpolicy.control.robots.trace import TraceRobot
from flowpolicy.control.statistics import run_statistics
from flowpolicy.control.system import ending_signals
from flowpolicy.data.store import read_demonstrations
from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.summary import machine, versions, write_summary
from flowpolicy.evaluation.task import Task, task_of
from flowpolicy.files.storage import write_json
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.progress import progress_bar
from flowpolicy.settings import choose, require

log = logging.getLogger(__name__)

FILM_S = 30.0
"""Seconds of film where none are named."""

ROBOT_SEED = 7_000_000
"""First environment seed of control runs; evaluation, calibration and training use lower ones."""


@dataclass(frozen=True)
class RobotConfig:
    """Which robot is driven.

    Attributes:
        kind: ``simulated``, the task's environment in wall-clock time, or ``trace``, recorded observations.
        seed: environment seed of the first episode.
        rate_hz: its rate; None takes the task's own.
        path: store of the trace; None takes the task's own demonstrations.
    """

    kind: str = "simulated"
    seed: int = ROBOT_SEED
    rate_hz: float | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        choose(_ROBOTS, self.kind, "robot.kind")


@dataclass(frozen=True, kw_only=True)
class RunConfig(SamplerChoice):
    """Settings of `scripts/run_control.py`: the sampler's, and these.

    Attributes:
        robot: what it drives.
        control: settings of the loop; a plan's T_e takes the place of an ``execute_horizon`` of None.
        fast_steps: K of the faster sampler that fills gaps; None has none, or the plan's.
        inference: ``process`` or ``thread``, where chunks are planned.
        spares: planners built and waiting, of which one takes over where the one at work fails; each takes
            the memory of one more policy.
        duration_s: of the run.
        seed: of the noises.
        video: seconds of film of a simulated robot, made afterwards; true makes 30 of them, false none.
        rerun: also write the telemetry for the Rerun viewer.
    """

    robot: RobotConfig = field(default_factory=RobotConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    fast_steps: int | None = None
    inference: str = "process"
    spares: int = SPARES
    duration_s: float = 30.0
    seed: int = 0
    video: bool | float = True
    rerun: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.duration_s > 0, "duration_s", self.duration_s, "positive")
        require(self.video >= 0, "video", self.video, "0 or more seconds, true or false")
        require(self.spares >= 0, "spares", self.spares, "0 or more")
        if self.plan and self.fast_steps is not None:
            raise ConfigError("plan= decides fast_steps too; leave out one of them.")
        if self.inpainting:
            plain = self.plan is None and self.schedule is None and self.dtype == "float32"
            if not plain or self.backend not in ("auto", "eager"):
                raise ConfigError(
                    "control.fusion=rtc plans its chunks in eager PyTorch; leave out plan=, schedule=, "
                    "dtype= and backend=, and name num_steps= where the policy's own is not wanted."
                )

    @property
    def inpainting(self) -> bool:
        """Whether chunks must agree with a prefix."""
        return self.control.fusion == "rtc"

    def samplers(
        self, policy: FlowPolicy, plan: DeploymentPlan | None
    ) -> tuple[SamplerSettings, SamplerSettings | None]:
        """Settings of the sampler and of the faster one."""
        if plan is not None:
            return plan.sampler_settings(self.checkpoint), plan.fast_settings(self.checkpoint)
        given = self.given()
        if self.fast_steps is None:
            return given, None
        policy.check_steps(self.fast_steps, policy.config.tuned_solver)
        return given, replace(given, num_steps=self.fast_steps, solver=None, schedule=None)


@dataclass(frozen=True)
class ControlRun:
    """What a run left behind.

    Attributes:
        stopped: why it ended.
        statistics: of ticks, delays, inference, sources and events.
        world: what a simulated robot says; None of others.
        files: telemetry, events, report and video.
        rate_hz: of the loop.
        task: the task's name.
        signal: number of the signal that ended it; 0 where none did.
    """

    stopped: str
    statistics: dict[str, Any]
    world: WorldReport | None
    files: list[Path]
    rate_hz: float
    task: str
    signal: int = 0

    def table(self) -> str:
        """Markdown: the run in a few lines."""
        found = self.statistics
        if not found["ticks"]:
            return f"No tick was run: {self.stopped}."
        jitter, planning, events = found["jitter_ms"], found["inference_ms"], found["events"]
        lines = [
            f"{found['seconds']:.1f} s at {self.rate_hz:g} Hz, ended: {self.stopped}",
            "",
            "| | p50 | p99 | p99.9 | max |",
            "| --- | --- | --- | --- | --- |",
        ]
        for label, values in (("tick after deadline, ms", jitter), ("planning a chunk, ms", planning)):
            if values is not None:
                cells = " | ".join(f"{values[name]:.3f}" for name in ("p50", "p99", "p99_9", "max"))
                lines.append(f"| {label} | {cells} |")
        delays = ", ".join(f"{actions} actions {count}x" for actions, count in found["delays"].items())
        lines += ["", f"delays: {delays or 'none'}"]
        lines.append("events: " + (", ".join(f"{name} {count}" for name, count in events.items()) or "none"))
        if self.world is not None:
            returns = ", ".join(f"{value:.0f}" for value in self.world.returns[: self.world.finished])
            lines.append(f"episodes finished: {self.world.finished}, returns {returns or 'none'}")
        return "\n".join(lines)

    def metrics(self) -> dict[str, Any]:
        """For ``summary.json``."""
        found: dict[str, Any] = {"stopped": self.stopped, **self.statistics}
        if self.world is not None:
            world = self.world
            found["world"] = {
                "episodes_finished": world.finished,
                "returns": world.returns,
                "lengths": world.lengths,
                "success": world.success,
                "score": world.score,
                "steps": world.steps,
                "late_steps": world.late_steps,
                "unheard_steps": world.unheard_steps,
                "deserted_steps": world.deserted_steps,
            }
        return found


def run_control(
    config: RunConfig,
    run_dir: Path,
    command: str,
    env: Mapping[str, Any] | None = None,
    dead_man: Callable[[], bool] | None = None,
) -> ControlRun:
    """Drive a robot for a while and write telemetry, events, a report, a video and ``summary.json``.

    A signal that ends programs (SIGINT, SIGTERM, SIGHUP, SIGQUIT) ends the drive and nothing else: everything
    is closed and written. Before the drive it ends the program, with what was opened closed.

    Raises:
        FlowPolicyError: a setting, the checkpoint, the plan, the robot or the backend is not usable.
    """
    loops: list[ControlLoop] = []

    def on_signal(number: int) -> None:
        if not any(loop.status.stopped for loop in loops):
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    with ending_signals(on_signal):
        return _run(config, run_dir, command, env, dead_man, loops)


def _run(
    config: RunConfig, run_dir: Path, command: str, env: Mapping[str, Any] | None,
    dead_man: Callable[[], bool] | None, loops: list[ControlLoop],
) -> ControlRun:  # fmt: skip
    """A run; its loop is put into ``loops`` as soon as there is one."""
    started = time.time()
    policy = FlowPolicy.load(config.checkpoint)
    task = task_of(policy.task, env, config.checkpoint)
    plan = config.read_plan(policy)
    settings, faster = config.samplers(policy, plan)
    control = config.control
    if plan is not None and control.execute_horizon is None:
        control = replace(control, execute_horizon=plan.execute_horizon)
    robot = choose(_ROBOTS, config.robot.kind, "robot.kind")(config.robot, task, policy, env or {})
    worker = fast = None
    try:
        robot.spec.check(policy)
        build = PlannerBuilder(settings, config.seed, config.inpainting)
        worker = build_worker(config.inference, build, config.spares)
        if faster is not None:
            fast = build_worker(config.inference, PlannerBuilder(faster, config.seed + 1), spares=0)
        loop = ControlLoop(robot, policy, worker, control, fast=fast, dead_man=dead_man)
        loops.append(loop)
        log.info("Driving %s at %g Hz; Ctrl-C stops it.", task.name, 1 / loop.period)
        expected = 1 if plan is None else plan.delay_ticks
        if loop.max_delay < expected:
            log.info(
                "A chunk of %d leaves room for a delay of %d actions: one that comes later leaves a gap, "
                "which a smaller control.execute_horizon would not.", policy.action_horizon, loop.max_delay,
            )  # fmt: skip
        with _live(loop, round(config.duration_s / loop.period)) as ticks:
            loop.run(ticks)
    finally:
        for part in (worker, fast, robot):
            if part is not None:
                part.close()
    world = robot.report() if isinstance(robot, SimulatedRobot) else None
    about = {
        "task": task.name, "robot": config.robot.kind, "checkpoint": config.checkpoint, "policy": policy.name,
        "num_steps": settings.num_steps or policy.default_num_steps,
        "backend": "eager" if config.inpainting else settings.backend,
        "plan": config.plan, "fast_steps": faster.num_steps if faster else None,
        "fusion": config.control.fusion, "action_horizon": policy.action_horizon,
        "execute_horizon": loop.execute_horizon, "max_delay": loop.max_delay, "rate_hz": 1 / loop.period,
        "inference": config.inference, "stopped": loop.status.stopped, "machine": machine(),
        "versions": versions(), "command": command,
    }  # fmt: skip
    result = _write(loop, about, world, task, run_dir, config)
    write_summary(
        run_dir, task=task.name, policy=policy.name, seed=config.seed, steps=loop.status.tick + 1,
        wall_seconds=time.time() - started, metrics=result.metrics(), checkpoint=config.checkpoint,
        command=command, about=about, files=[str(file) for file in result.files],
    )  # fmt: skip
    return result


def _write(
    loop: ControlLoop, about: dict[str, Any], world: WorldReport | None, task: Task, run_dir: Path,
    config: RunConfig,
) -> ControlRun:  # fmt: skip
    columns, events = loop.telemetry.columns(), loop.events.content()
    files = [loop.telemetry.write(run_dir), run_dir / "events.json"]
    write_json(files[1], events)
    video = None
    if world is not None and config.video > 0 and loop.status.signal in (0, signal.SIGINT):
        # What sent any other signal does not wait long.
        seconds = FILM_S if config.video is True else float(config.video)
        video = film(task, world, run_dir / "run.mp4", seconds)
    if config.rerun:
        from flowpolicy.control.rerun_log import write_rerun

        files.append(write_rerun(run_dir / "telemetry.rrd", columns, events))
    files.append(write_report(run_dir / "report.html", columns, events, about, video))
    if video is not None:
        files.append(video)
    statistics = run_statistics(columns, loop.period) | {"events": events["counts"]}
    return ControlRun(
        loop.status.stopped, statistics, world, files, 1 / loop.period, task.name, loop.status.signal
    )


@contextmanager
def _live(loop: ControlLoop, ticks: int) -> Iterator[int]:
    """Show the loop's status on a terminal, from a thread of its own."""
    ended = threading.Event()

    def show() -> None:
        seen = 0
        with progress_bar(ticks, "control") as bar:
            while not ended.wait(0.5):
                status = loop.status
                bar.update(
                    status.tick - seen, chunks=status.chunks, delay=status.delay, misses=status.misses,
                    inference_ms=1e3 * status.inference, events=sum(loop.events.counts.values()),
                )  # fmt: skip
                seen = status.tick

    thread = threading.Thread(target=show, daemon=True, name="status")
    thread.start()
    try:
        yield ticks
    finally:
        ended.set()
        thread.join(2.0)


def _simulated(config: RobotConfig, task: Task, policy: FlowPolicy, env: Mapping[str, Any]) -> Robot:
    return SimulatedRobot(task, seed=config.seed, rate_hz=config.rate_hz)


def _trace(config: RobotConfig, task: Task, policy: FlowPolicy, env: Mapping[str, Any]) -> Robot:
    path = config.path or env.get("demonstrations")
    if not path:
        raise ConfigError("A trace needs robot.path=STORE, or env= of a task that names its demonstrations.")
    demos = read_demonstrations(path, policy.observation_shapes)
    return TraceRobot.of(
        demos, policy.observation_shapes, config.rate_hz or task.control_hz, task.safe_action or "hold"
    )


_ROBOTS: dict[str, Callable[[RobotConfig, Task, FlowPolicy, Mapping[str, Any]], Robot]] = {
    "simulated": _simulated,
    "trace": _trace,
}
