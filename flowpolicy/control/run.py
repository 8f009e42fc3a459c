"""A control run from a checkpoint to a report: build robot and samplers, run the loop, write the results."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowpolicy.control.checklist import CheckList
from flowpolicy.control.events import EventLog
from flowpolicy.control.inference import build_worker
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.operator import Operator
from flowpolicy.control.operators.choosing import build_operator
from flowpolicy.control.policy_source import PolicySource
from flowpolicy.control.recorder import Recorder
from flowpolicy.control.report import write_report
from flowpolicy.control.robot import Robot, innermost
from flowpolicy.control.robots.choosing import build_robot
from flowpolicy.control.robots.instructed import instructed
from flowpolicy.control.robots.rehearsal import Rehearsal, RehearsalFindings
from flowpolicy.control.robots.simulated import SimulatedRobot, WorldReport, record_video
from flowpolicy.control.run_config import RunConfig
from flowpolicy.control.served import Connect
from flowpolicy.control.statistics import run_statistics
from flowpolicy.control.system import ending_signals
from flowpolicy.evaluation.summary import machine, versions, write_summary
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.files.storage import write_json
from flowpolicy.rounding import three_digits
from flowpolicy.runs.progress import progress_bar

log = logging.getLogger(__name__)

VIDEO_S = 30.0
"""Seconds of video where none are named."""


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
        recorded: store of the episodes; None where there is none.
        rehearsal: what a run that sent nothing would have sent.
    """

    stopped: str
    statistics: dict[str, Any]
    world: WorldReport | None
    files: list[Path]
    rate_hz: float
    task: str
    signal: int = 0
    recorded: Path | None = None
    rehearsal: RehearsalFindings | None = None

    def table(self) -> str:
        """Markdown: the run in a few lines."""
        found = self.statistics
        if not found["ticks"]:
            return f"No tick was run: {self.stopped}."
        jitter, inference, events = found["jitter_ms"], found["inference_ms"], found["events"]
        lines = [
            f"{found['seconds']:.1f} s at {self.rate_hz:g} Hz, ended: {self.stopped}",
            "",
            "| | p50 | p99 | p99.9 | max |",
            "| --- | --- | --- | --- | --- |",
        ]
        for label, values in (("tick after deadline, ms", jitter), ("sampling a chunk, ms", inference)):
            if values is not None:
                cells = " | ".join(f"{values[name]:.3f}" for name in ("p50", "p99", "p99_9", "max"))
                lines.append(f"| {label} | {cells} |")
        delays = ", ".join(f"{actions} actions {count}x" for actions, count in found["delays"].items())
        lines += ["", f"delays: {delays or 'none'}"]
        lines.append("events: " + (", ".join(f"{name} {count}" for name, count in events.items()) or "none"))
        if self.world is not None:
            returns = ", ".join(three_digits(value) for value in self.world.returns[: self.world.finished])
            lines.append(f"episodes finished: {self.world.finished}, returns {returns or 'none'}")
        if self.recorded is not None:
            lines.append(f"recorded: {self.recorded}")
        if self.rehearsal is not None:
            lines += ["", self.rehearsal.table()]
        return "\n".join(lines)

    def metrics(self) -> dict[str, Any]:
        """For ``summary.json``."""
        found: dict[str, Any] = {"stopped": self.stopped, **self.statistics}
        if self.world is not None:
            world = {key: value for key, value in vars(self.world).items() if key not in ("seed", "commands")}
            found["world"] = {"episodes_finished": world.pop("finished"), **world}
        if self.rehearsal is not None:
            found["would_have_sent"] = self.rehearsal.rows()
        return found


def run_control(
    config: RunConfig,
    run_dir: Path,
    command: str = "",
    env: Mapping[str, Any] | None = None,
    dead_man: Callable[[], bool] | None = None,
    robot: Robot | None = None,
    operator: Operator | None = None,
    connect: Connect | None = None,
    source: PolicySource | None = None,
) -> ControlRun:
    """Control a robot for a while and write telemetry, events, a report, a video and ``summary.json``.

    A signal that ends programs (SIGINT, SIGTERM, SIGHUP, SIGQUIT) ends only the loop; everything is then
    closed and written. Before the loop has started it ends the program, after closing what was opened.

    A robot that moves goes through a check list first, which may refuse the run
    (:mod:`flowpolicy.control.checklist`).

    Args:
        config: the settings.
        run_dir: where it is all written.
        command: that made the run, for the summary.
        env: the task, where it is not the checkpoint's.
        dead_man: called at every tick; False sends the safe action.
        robot: is controlled in place of ``config.robot``, and closed at the end.
        operator: may take command, in place of ``config.operator``.
        connect: connects to ``config.policy_server``: :class:`flowpolicy.serving.remote.RemotePolicy`.
        source: of the policy, in place of the one that ``config`` names; it is closed at the end.

    Raises:
        FlowPolicyError: a setting, the checkpoint, the plan, the robot or the backend is not usable.
    """
    loop: ControlLoop | None = None

    def on_signal(number: int) -> None:
        if loop is None or not loop.status.stopped:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    started = time.time()
    with ending_signals(on_signal), ExitStack() as opened:
        opened.callback(lambda: robot.close() if robot is not None else None)
        if operator is None and config.operator is not None:
            operator = build_operator(config.operator)
        control = config.control
        kind = config.robot.kind if robot is None else f"{type(robot).__module__}:{type(robot).__name__}"
        source = source or config.source(connect)
        opened.callback(source.close)
        if robot is None:
            robot = build_robot(config.robot, source.policy, env, source.name)
        policy = source.adopt(robot)
        plan = source.plan
        if plan is not None and control.execute_horizon is None:
            control = replace(control, execute_horizon=plan.execute_horizon)
        if config.dry_run:
            robot = Rehearsal(robot)
        commanded = instructed(robot, policy, config.task)
        commanded.spec.check(policy)
        events, recorder = EventLog(), None
        if config.record is not None:
            rate = control.rate_hz or robot.spec.rate_hz
            recorder = Recorder(config.record, policy.spec.features, events, _attributes(policy, env, rate))
            opened.callback(recorder.close)
        build, build_fast = source.builders()
        fast = None
        if build_fast is not None:
            fast = build_worker(config.inference, build_fast, spares=0)
            opened.callback(fast.close)
        worker = build_worker(config.inference, build, config.spares)
        opened.callback(worker.close)
        task = str((env or policy.spec.task).get("name") or robot.spec.name)
        loop = ControlLoop(
            commanded, policy, worker, control, fast=fast, dead_man=dead_man, operator=operator,
            recorder=recorder, events=events,
        )  # fmt: skip
        log.info("Controlling %s at %g Hz; Ctrl-C stops it.", robot.spec.name, 1 / loop.period)
        if loop.max_delay < (1 if plan is None else plan.delay_ticks):
            log.info(
                "A chunk of %d leaves room for a delay of %d actions: one that comes later leaves a gap, "
                "which a smaller control.execute_horizon would not.",
                policy.spec.action_horizon, loop.max_delay,
            )  # fmt: skip
        opened.callback(commanded.close)  # before recorder and workers, which may take their time
        opened.enter_context(loop.operating())
        checks: list[dict[str, Any]] = []
        if robot.spec.is_hardware:
            log.info("Check list:")
            listed = CheckList(loop, policy, worker, complete=config.checklist, rehearsal=config.dry_run)
            listed.go()
            checks = listed.content()
            if isinstance(robot, Rehearsal):
                robot.first = listed.first
        ticks = round(config.duration_s / loop.period)
        source.watch(loop.stop)
        with _live(loop, ticks):
            loop.run(ticks)
        unclosed: Exception | None = None
        try:
            opened.close()
        except Exception as error:  # a device that is gone: what the run found out is written first
            unclosed = error
        recorded = None if recorder is None else recorder.path
        about = {
            "task": task, "robot": kind, **source.about(), "policy": policy.spec.name,
            "dry_run": config.dry_run or None,
            "fusion": control.fusion, "action_horizon": policy.spec.action_horizon,
            "execute_horizon": loop.execute_horizon, "max_delay": loop.max_delay, "rate_hz": 1 / loop.period,
            "inference": config.inference, "operator": getattr(operator, "name", None),
            "recorded": None if recorded is None else str(recorded), "stopped": loop.status.stopped,
            "machine": machine(), "versions": versions(), "command": command,
        }  # fmt: skip
        if checks:
            about["checks"] = {check["name"]: check["found"] for check in checks}
        run = replace(_write(loop, about, robot, run_dir, config), recorded=recorded)
        write_summary(
            run_dir, task=task, policy=policy.spec.name, seed=config.seed, steps=loop.status.tick + 1,
            wall_seconds=time.time() - started, metrics=run.metrics(), checkpoint=config.checkpoint,
            command=command, about=about, files=[str(file) for file in run.files],
        )  # fmt: skip
        if unclosed is not None:
            raise unclosed
        return run


def _write(
    loop: ControlLoop, about: dict[str, Any], robot: Robot, run_dir: Path, config: RunConfig
) -> ControlRun:
    columns, events, status = loop.telemetry.columns(), loop.events.content(), loop.status
    files = [loop.telemetry.write(run_dir), run_dir / "events.json"]
    write_json(files[1], events)
    world = video = None
    rehearsal = robot.findings(1 / loop.period) if isinstance(robot, Rehearsal) else None
    robot = innermost(robot)
    if isinstance(robot, SimulatedRobot) and (world := robot.report()) is not None:
        seconds = VIDEO_S if config.video is True else float(config.video)
        if seconds > 0 and status.signal in (0, signal.SIGINT):  # what sent any other does not wait long
            video = record_video(robot.task, world, run_dir / "run.mp4", seconds)
    if config.rerun:
        from flowpolicy.control.rerun_log import write_rerun

        files.append(write_rerun(run_dir / "telemetry.rrd", columns, events))
    files.append(write_report(run_dir / "report.html", columns, events, about, video))
    if video is not None:
        files.append(video)
    statistics = run_statistics(columns, loop.period) | {"events": events["counts"]}
    return ControlRun(
        status.stopped, statistics, world, files, 1 / loop.period, about["task"], status.signal,
        rehearsal=rehearsal,
    )  # fmt: skip


def _attributes(policy: ChunkPolicy, env: Mapping[str, Any] | None, rate_hz: float) -> dict[str, Any]:
    """What a recording says of where it comes from."""
    task = env or policy.spec.task
    known = {key: task[key] for key in ("env_id", "env_kwargs") if task.get(key)}
    return {**known, "fps": rate_hz, "source": "recorded by run_control", "versions": versions()}


@contextmanager
def _live(loop: ControlLoop, ticks: int) -> Iterator[None]:
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
        yield
    finally:
        ended.set()
        thread.join(2.0)
