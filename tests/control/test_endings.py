"""However a loop ends, the robot's last command is its safe action; and one loop drives one robot."""

from __future__ import annotations

import dataclasses
import signal
import tempfile
import threading
import time

import pytest
from control_toys import A, ToyClock, ToyPolicy, ToyRobot, ToyWorker

from flowpolicy.control.config import ControlConfig
from flowpolicy.control.events import Event
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.robots.choosing import RobotConfig
from flowpolicy.control.robots.passing import PassingRobot
from flowpolicy.control.run import run_control
from flowpolicy.control.run_config import RunConfig
from flowpolicy.control.system import ENDING, exclusive
from flowpolicy.errors import ConfigError, TaskError


def build(robot=None, **settings):
    robot = robot or ToyRobot(ToyClock(), safe_action=(0.5,) * A)
    config = ControlConfig(priority=False, wait_share=0.0, **settings)
    return robot, ControlLoop(robot, ToyPolicy(), ToyWorker(1), config, clock=robot.clock)


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("times", [1, 3])
def test_a_signal_ends_the_loop_with_the_safe_action(number, times):
    robot, loop = build()
    before = {number: signal.getsignal(number) for number in ENDING}

    def act(action):
        if loop.status.tick >= 20:  # one in the loop, the others while it ends
            for _ in range(times):
                signal.raise_signal(number)

    robot.on_act = act
    status = loop.run(1000)
    assert status.tick == 20
    assert status.signal == number
    assert status.stopped.startswith("interrupted")
    assert (robot.commands[-1] == 0.5).all()
    assert before == {number: signal.getsignal(number) for number in ENDING}


@pytest.mark.usefixtures("empty_figures")
def test_a_run_that_is_told_to_end_writes_everything(tmp_path, repo_root):
    calls = []

    def dead_man():
        calls.append(0)
        if len(calls) == 30:
            signal.raise_signal(signal.SIGTERM)
        return True

    config = RunConfig(
        checkpoint=str(repo_root / "benchmarks/checkpoints/hopper-shortcut-seed0"), num_steps=1,
        backend="eager",
        robot=RobotConfig("trace", path="pkg://flowpolicy_envs/assets/hopper-medium.zarr.zip"),
        inference="thread", duration_s=60.0, video=0.0, control=ControlConfig(priority=False),
    )  # fmt: skip
    run = run_control(config, tmp_path, "", dead_man=dead_man)
    assert (run.signal, run.stopped) == (signal.SIGTERM, "interrupted by SIGTERM")
    assert len(calls) == 30
    assert {"events.json", "report.html", "summary.json"} <= {file.name for file in tmp_path.iterdir()}


def test_an_ignored_signal_stays_ignored():
    robot, loop = build()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        robot.on_act = lambda action: signal.raise_signal(signal.SIGHUP)
        assert loop.run(30).stopped == "finished"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_exception_in_the_loop_leaves_the_safe_action():
    robot, loop = build()
    loop.telemetry.add = lambda *values: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loop.run(10)
    assert (robot.commands[-1] == 0.5).all()


@pytest.mark.parametrize("call", ["observe", "act"])
def test_a_call_that_never_returns_is_an_event_and_the_program_can_be_stopped(call):
    robot, loop = build(driver_timeout_s=0.05)

    def hang(value):
        if loop.status.tick == 20 and not loop.status.stopped:
            time.sleep(60)
        return value

    setattr(robot, f"on_{call}", hang)
    began = time.monotonic()

    def end():
        while not loop.events.counts[Event.DRIVER_HANG]:
            time.sleep(0.005)
        while call == "observe" and not (robot.commands[-1] == 0.5).all():
            time.sleep(0.005)
        seen.append(len(robot.commands))
        loop.stop("stopped")

    seen: list[int] = []
    threading.Thread(target=end, daemon=True).start()
    status = loop.run(1000)
    assert time.monotonic() - began < 5
    assert (status.stopped, status.tick) == ("stopped", 20)
    assert loop.events.counts[Event.DRIVER_HANG] == 1
    assert (robot.commands[-1] == 0.5).all()
    assert len(robot.commands) > seen[0]


def test_a_dead_man_switch_that_hangs_is_not_held():
    robot = ToyRobot(ToyClock(), safe_action=(0.5,) * A)
    config = ControlConfig(priority=False, wait_share=0.0, driver_timeout_s=0.05)
    stood = []

    def switch():
        if loop.status.tick == 20:
            until = time.monotonic() + 5
            while not (robot.commands[-1] == 0.5).all() and time.monotonic() < until:
                time.sleep(0.005)
            stood.append(robot.commands[-1])
        return True

    loop = ControlLoop(robot, ToyPolicy(), ToyWorker(1), config, clock=robot.clock, dead_man=switch)
    assert loop.run(30).stopped == "finished"
    assert (stood[0] == 0.5).all()
    assert loop.events.counts[Event.DRIVER_HANG] == 1


def test_a_rate_at_which_the_robot_would_act_by_itself_is_refused():
    robot = ToyRobot(ToyClock())
    robot.spec = dataclasses.replace(robot.spec, heartbeat_s=0.5)
    with pytest.raises(ConfigError, match="at least 4, as the robot takes its safe action by itself"):
        build(robot, rate_hz=3.0)
    build(robot, rate_hz=4.0)


def test_a_second_loop_on_one_robot_is_refused(tmp_path):
    robot, loop = build()
    refused = []

    def act(action):
        if loop.status.tick == 5:
            with pytest.raises(TaskError, match="another control loop"):
                build(robot)[1].run(10)
            refused.append(len(robot.commands))

    robot.on_act = act
    loop.run(20)
    assert refused == [5]
    robot.on_act = lambda action: None
    assert build(robot)[1].run(5).stopped == "finished"


def test_a_device_is_driven_by_one_program(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one, other, another = (ToyRobot(ToyClock()) for _ in range(3))
    for robot, device in ((one, "/dev/ttyUSB0"), (other, "/dev/ttyUSB0"), (another, "/dev/ttyUSB1")):
        robot.spec = dataclasses.replace(robot.spec, device=device)
    with (
        exclusive(one),
        exclusive(another),
        pytest.raises(TaskError, match="toy at /dev/ttyUSB0 is controlled by another program"),
        exclusive(other),
    ):
        pass
    with exclusive(other):
        pass
    wrapped = PassingRobot(PassingRobot(another))
    with (
        exclusive(wrapped),
        pytest.raises(TaskError, match="another control loop"),
        exclusive(PassingRobot(another)),
    ):
        pass
