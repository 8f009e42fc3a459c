"""A world in its own process: it keeps its own time, executes the newest command, and leaves a video."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from flowpolicy.control.robot import RobotError
from flowpolicy.control.robots.shared import Mailbox
from flowpolicy.control.robots.simulated import SimulatedRobot, record_video
from flowpolicy.errors import ConfigError, TaskError
from flowpolicy.evaluation.task import Task

pytest.importorskip("mujoco", reason="mujoco is not installed")

PENDULUM = Task("pendulum", "InvertedPendulum-v5", control_hz=50.0, safe_action="zero")


@pytest.fixture
def robot():
    made = SimulatedRobot(PENDULUM, seed=3)
    yield made
    made.close()


def test_the_world_waits_for_the_first_command_and_then_for_nobody(robot):
    first = robot.observe()
    time.sleep(0.2)
    second = robot.observe()
    np.testing.assert_array_equal(first["observation"], second["observation"])
    assert second["timestamp"] > first["timestamp"]  # but it is not stale
    robot.act(np.zeros(1, np.float32))
    started = time.monotonic()
    time.sleep(0.4)
    robot.close()
    elapsed = time.monotonic() - started
    report = robot.report()
    assert abs(report.steps - 50 * elapsed) <= 6
    assert report.unheard_steps == report.steps - 1  # one command, executed again and again
    assert report.returns[0] >= report.lengths[0] - 1 > 10  # 1 a step while the pole stands


def test_a_deserted_world_applies_its_safe_action_by_itself():
    robot = SimulatedRobot(PENDULUM, seed=3, heartbeat_s=0.1)
    robot.observe()
    robot.act(np.full(1, 0.02, np.float32))
    time.sleep(0.4)
    robot.close()
    report = robot.report()
    commands = report.commands[0][:, 0]
    assert commands[0] != 0
    assert commands[-1] == 0
    assert (commands == 0).sum() == report.deserted_steps < report.unheard_steps


def test_the_same_seed_and_commands_give_the_same_world(robot, tmp_path):
    env = PENDULUM.make()
    wanted, _ = env.reset(seed=3)
    np.testing.assert_allclose(robot.observe()["observation"], wanted["observation"])
    for _ in range(20):
        robot.act(np.array([0.3], np.float32))
        time.sleep(0.01)
    robot.close()
    report = robot.report()
    assert report.seed == 3
    for command in report.commands[0]:
        np.testing.assert_allclose(command, [0.3], atol=1e-6)
        observation, *_ = env.step(command)
    assert np.isfinite(observation["observation"]).all()
    assert len(report.commands[0]) == report.lengths[0] > 3


def test_an_episode_that_ends_waits_for_an_answer_to_its_new_observation(robot):
    robot.observe()
    deadline = time.monotonic() + 10
    while robot.observe()["episode"] == 0:
        robot.act(np.array([3.0], np.float32))  # throws the pole over
        time.sleep(0.005)
        assert time.monotonic() < deadline
    before = robot.observe()
    time.sleep(0.2)
    after = robot.observe()
    assert before["episode"] == after["episode"] == 1
    np.testing.assert_array_equal(before["observation"], after["observation"])
    robot.act(np.zeros(1, np.float32))
    time.sleep(0.2)
    robot.close()
    assert robot.report().finished >= 1
    assert robot.report().lengths[1] >= 3


def test_a_world_that_dies_is_an_error_and_not_a_hang(robot):
    os.kill(robot._world.pid, signal.SIGKILL)
    until = time.monotonic() + 5
    while robot._world.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    with pytest.raises(RobotError, match="process ended"):
        robot.observe()
    robot.close()
    assert robot.report() is None


def test_the_video_shows_the_run(robot, tmp_path):
    pytest.importorskip("imageio", reason="imageio is not installed")
    for _ in range(30):
        robot.act(np.array([0.1], np.float32))
        time.sleep(0.02)
    robot.close()
    path = record_video(PENDULUM, robot.report(), tmp_path / "run.mp4", seconds=0.4)
    if path is None:
        pytest.skip("nothing can be rendered here")
    assert path.stat().st_size > 1000


def test_a_task_without_a_safe_action_or_an_environment_is_refused():
    with pytest.raises(ConfigError, match="safe action"):
        SimulatedRobot(Task("pendulum", "InvertedPendulum-v5"))
    with pytest.raises(TaskError, match="cannot be made"):
        SimulatedRobot(Task("nothing", "Nothing-v0", safe_action="zero"))


def test_a_mailbox_gives_the_newest_record():
    mailbox = Mailbox({"x": ((3,), np.float32), "n": ((), np.int64)})
    assert mailbox.read() is None
    for n in range(11):
        mailbox.write(x=np.full(3, n), n=n)
    record = mailbox.read()
    assert int(record["n"]) == 10
    assert (record["x"] == 10).all()
    assert mailbox.count == 11


def test_an_operator_ends_an_episode_and_the_world_begins_another(robot):
    first = robot.observe()
    robot.act(np.zeros(1, np.float32))
    time.sleep(0.1)
    robot.end_episode()
    robot.act(np.zeros(1, np.float32))  # the loop goes on commanding meanwhile
    until = time.monotonic() + 2
    while (found := robot.observe())["episode"] == first["episode"] and time.monotonic() < until:
        time.sleep(0.005)
    assert found["episode"] == first["episode"] + 1
    assert found["success"] == -1  # the pendulum does not say
    robot.close()
    assert robot.report().finished == 1
