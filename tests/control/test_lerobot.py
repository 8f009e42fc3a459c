"""A robot of lerobot under the control loop: a fake of its interface always, lerobot's own mock where it is.

lerobot's mock robot lives in its source tree, not in its package. To test against it, install lerobot, check
its source out in the same version (``git clone https://github.com/huggingface/lerobot --branch v0.4.4``), and
name the checkout: ``LEROBOT_SOURCE=lerobot pytest tests/control/test_lerobot.py``.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from control_toys import ToyPolicy, ToyWorker

from flowpolicy.control.checklist import CheckList
from flowpolicy.control.config import ControlConfig
from flowpolicy.control.events import Event
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.robot import RobotError
from flowpolicy.control.robots.lerobot import LeRobotRobot
from flowpolicy.control.safety import SafetyConfig
from flowpolicy.control.telemetry import CHUNK, SAFE
from flowpolicy.errors import ConfigError, TaskError


class FakeArm:
    """Two joints and a camera; position follows the command, and a serial bus that bears one caller."""

    name = "fake_arm"
    observation_features = {"a.pos": float, "b.pos": float, "front": (4, 6, 3), "a.vel": float}  # noqa: RUF012
    action_features = {"b.pos": float, "a.pos": float}  # noqa: RUF012

    def __init__(self, seconds=0.0):
        self.is_connected, self.is_calibrated = False, True
        self.seconds = seconds
        self.position = {"a.pos": 1.0, "b.pos": 2.0}
        self.sent, self.polls, self.disconnected = [], 0, 0
        self.fault = lambda: None
        self.collided = False
        self._busy = threading.Lock()

    def connect(self, calibrate=True):
        assert not calibrate, "calibration asks questions"
        self.is_connected = True

    def _use_bus(self, seconds):
        self.collided |= not self._busy.acquire(blocking=False)
        time.sleep(seconds)
        self._busy.release()

    def get_observation(self):
        self._use_bus(self.seconds)
        self.polls += 1
        self.fault()
        frame = np.full((4, 6, 3), self.polls % 256, np.uint8)
        return {**self.position, "a.vel": 3.0, "front": frame}

    def send_action(self, action):
        self._use_bus(0.0)
        self.sent.append(action)
        self.position = dict(action)
        return action

    def disconnect(self):
        self.is_connected = False
        self.disconnected += 1


def adapted(arm, **settings):
    given = {"rate_hz": 100.0, "action_low": [-1, -1], "action_high": [1, 1], **settings}
    return LeRobotRobot(arm, **given)


def soon(condition, seconds=2.0):
    """Whether it comes true within this time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False


@pytest.fixture
def arm():
    return FakeArm()


@pytest.fixture
def robot(arm):
    robot = adapted(arm)
    yield robot
    robot.close()


def test_scalars_become_a_vector_and_images_pass_through(robot):
    assert robot.spec.observation_shapes == {"front": (4, 6, 3), "observation": (3,)}
    found = robot.observe()
    np.testing.assert_array_equal(found["observation"], np.float32([1, 2, 3]))
    assert found["observation"].dtype == np.float32
    assert found["front"].shape == (4, 6, 3)
    assert found["front"].dtype == np.uint8


def test_the_order_of_the_vector_can_be_stated(arm):
    robot = adapted(arm, observation=["b.pos", "a.pos"])
    np.testing.assert_array_equal(robot.observe()["observation"], np.float32([2, 1]))
    robot.close()


def test_commands_go_to_the_action_features_in_their_order(robot, arm):
    robot.act(np.float32([0.25, -0.5]))
    assert arm.sent == [{"b.pos": 0.25, "a.pos": -0.5}]
    assert type(arm.sent[0]["b.pos"]) is float
    assert soon(lambda: robot.observe()["observation"][0] == np.float32(-0.5))


def test_observing_never_waits_for_a_slow_robot_and_says_how_old_it_is():
    arm = FakeArm(seconds=0.15)
    robot = adapted(arm)
    took, ages, steps = [], [], set()
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        began = time.monotonic()
        found = robot.observe()
        took.append(time.monotonic() - began)
        ages.append(began - found["timestamp"])
        steps.add(int(found["front"][0, 0, 0]))
        time.sleep(0.005)
    robot.close()
    assert np.median(took) < 0.005 < 0.15 / 10
    assert min(ages) >= 0.149  # a poll takes this long, and its age counts from before it
    assert len(steps) >= 3


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="this system has no such scheduling")
def test_a_poll_that_holds_the_bus_is_scheduled_as_the_loop_that_waits_for_it(arm, monkeypatch):
    asked = []
    monkeypatch.setattr(
        os,
        "sched_setscheduler",
        lambda _, policy, __: asked.append((threading.current_thread().name, policy)),
    )
    adapted(arm).close()
    assert asked[0] == ("poll fake_arm", os.SCHED_FIFO | os.SCHED_RESET_ON_FORK)


def test_commands_and_polls_take_turns_on_the_bus():
    arm = FakeArm(seconds=0.005)
    robot = adapted(arm, rate_hz=1000.0, act_timeout_s=1.0)  # polls follow each other without a pause
    for _ in range(50):
        robot.act(np.float32([0, 0]))
    robot.close()
    assert len(arm.sent) == 50
    assert not arm.collided


def test_a_bus_that_hangs_is_an_error_and_not_a_wait(robot, arm):
    release = threading.Event()
    arm.fault = lambda: release.wait(5.0)
    polls = arm.polls
    assert soon(lambda: arm.polls > polls)
    began = time.monotonic()
    with pytest.raises(RobotError, match="holds the bus"):
        robot.act(np.float32([0, 0]))
    assert time.monotonic() - began < 0.5
    last = robot.observe()["timestamp"]
    time.sleep(0.05)
    assert robot.observe()["timestamp"] == last  # it ages, for the loop to see
    release.set()
    assert soon(lambda: robot.observe()["timestamp"] > last)


def test_a_failed_poll_is_told_once_and_polling_goes_on(robot, arm):
    def fail():
        arm.fault = lambda: None
        raise ConnectionError("no status packet")

    before = robot.observe()["timestamp"]
    arm.fault = fail

    def told():
        try:
            robot.observe()
        except RobotError as error:
            return "ConnectionError: no status packet" in str(error)
        return False

    assert soon(told)
    assert soon(lambda: robot.observe()["timestamp"] > before)  # raises if it were told again


@pytest.mark.parametrize("arms", [("bus",), ("left_arm", "right_arm")])
def test_an_answer_that_came_too_late_is_not_taken_for_the_next_one(arm, arms):
    leftovers = {name: [] for name in arms}
    for name, leftover in leftovers.items():
        bus = SimpleNamespace(
            port_handler=SimpleNamespace(ser=SimpleNamespace(reset_input_buffer=leftover.clear))
        )
        setattr(arm, name, bus if name == "bus" else SimpleNamespace(bus=bus))
    seen = []

    def arrive():
        seen.append([*leftovers.values()] == [[] for _ in arms])
        for leftover in leftovers.values():
            leftover.append("late")

    arm.fault = arrive
    robot = adapted(arm)
    assert soon(lambda: len(seen) > 5, 10.0)
    robot.close()
    assert all(seen)


def test_a_missing_feature_is_named(robot, arm):
    arm.position = {"a.pos": 0.0}
    with pytest.raises(RobotError, match=r"b\.pos"):
        soon(lambda: robot.observe() is None, 1.0)


def test_a_refused_command_is_a_robot_error(robot, arm):
    def refuse(action):
        raise OSError("overload")

    arm.send_action = refuse
    with pytest.raises(RobotError, match="send_action: OSError: overload"):
        robot.act(np.float32([0, 0]))


def test_closing_twice_disconnects_once_and_ends_the_thread(arm):
    before = threading.active_count()
    robot = adapted(arm)
    robot.close()
    robot.close()
    assert arm.disconnected == 1
    assert threading.active_count() == before
    for call in (robot.observe, lambda: robot.act(np.float32([0, 0]))):
        with pytest.raises(RobotError, match="closed"):
            call()


def test_a_robot_that_was_connected_stays_connected(arm):
    arm.is_connected = True
    adapted(arm).close()
    assert arm.disconnected == 0


def never_answers(arm):
    def fail():
        raise TimeoutError("camera")

    arm.fault = fail
    return {"start_timeout_s": 0.1}


def uncalibrated(arm):
    arm.is_calibrated = False


def answers_no_more(arm):
    def is_calibrated(self):
        raise ConnectionError("no status packet")

    arm.__class__ = type("SilentArm", (FakeArm,), {"is_calibrated": property(is_calibrated)})


def unplugged(arm):
    def connect(calibrate):
        raise OSError("no port")

    arm.connect = connect


@pytest.mark.parametrize(
    ("prepare", "settings", "error", "words"),
    [
        (never_answers, {}, TaskError, r"no observation within 0\.1 s \(TimeoutError: camera\)"),
        (uncalibrated, {}, TaskError, "lerobot-calibrate"),
        (answers_no_more, {}, TaskError, "cannot be connected .*no status packet"),
        (unplugged, {}, TaskError, "no port"),
        (None, {"action_low": [-1], "action_high": [1]}, TaskError, r"takes 2 numbers \(b\.pos, a\.pos\)"),
        (None, {"observation": ["a.poss"]}, ConfigError, r"did you mean 'a\.pos'"),
        (None, {"act_timeout_s": 0.0}, ConfigError, "act_timeout_s"),
        (None, {"rate_hz": 0.0}, ConfigError, "rate_hz"),
    ],
)
def test_what_cannot_work_is_refused_and_left_disconnected(arm, prepare, settings, error, words):
    more = prepare(arm) if prepare is not None else None
    before = threading.active_count()
    with pytest.raises(error, match=words):
        adapted(arm, **settings, **(more or {}))
    assert not arm.is_connected
    assert threading.active_count() == before


def test_the_loop_drives_it_and_survives_a_bus_that_fails_for_a_while(arm):
    robot = adapted(arm, safe_action="zero")
    config = ControlConfig(
        priority=False, safety=SafetyConfig(max_observation_age_s=0.05, miss_limit=1000), wait_share=0.0
    )
    loop = ControlLoop(robot, ToyPolicy(), ToyWorker(1), config)

    counts = loop.events.counts

    def fail():  # until it was noticed, which on a busy machine takes longer
        is_noticed = min(counts[Event.ROBOT_ERROR], counts[Event.OBSERVATION_STALE]) >= 5
        if loop.status.tick >= 30 and not is_noticed:
            raise ConnectionError("bus")

    arm.fault = fail
    loop.run(160)
    robot.close()
    rows = loop.telemetry.rows()
    source, tick, age = rows["source"], rows["tick"], rows["observation_age"]
    stale = age > 0.05
    assert stale.sum() >= 5
    assert set(source[stale]) == {SAFE}
    last = np.flatnonzero(stale)[-1]
    assert (source[last + 10 :] == CHUNK).mean() > 0.8
    assert np.nanmax(age[(tick > 5) & (tick < 30)]) < 0.05


def test_a_bus_that_fails_now_and_then_is_told_of_every_time_and_nothing_jumps(arm):
    arm.position = {"a.pos": 0.5, "b.pos": -0.5}
    failures = []

    def fail():
        if arm.polls % 7 == 0:
            failures.append(arm.polls)
            raise ConnectionError("no status packet")

    send = arm.send_action

    def refuse(action):
        if len(arm.sent) % 11 == 10 and refuse.armed:
            refuse.armed = False
            raise OSError("overload")
        refuse.armed = True
        return send(action)

    refuse.armed = True
    arm.fault, arm.send_action = fail, refuse
    robot = adapted(arm)
    rng = np.random.default_rng(0)
    policy, limit = ToyPolicy(), 2.0
    worker = ToyWorker(1, lambda request: rng.uniform(-1, 1, (8, 2)).astype(np.float32))
    config = ControlConfig(priority=False, wait_share=0.0, safety=SafetyConfig(velocity_limit=limit))
    loop = ControlLoop(robot, policy, worker, config)
    checks = CheckList(loop, policy, worker, complete=False).go()
    before = len(failures)
    status = loop.run(100)
    robot.close()
    assert [check.name for check in checks] == ["observations", "limits", "first command"]
    assert status.stopped == "finished"
    path = np.array([[-0.5, 0.5], *([sent["b.pos"], sent["a.pos"]] for sent in arm.sent)])
    assert np.abs(np.diff(path, axis=0)).max() <= limit / 100 * 1.001
    details = [record.detail for record in loop.events.records]
    assert sum("overload" in detail for detail in details) >= 1
    observed = loop.events.counts[Event.ROBOT_ERROR] - sum(detail.startswith("act:") for detail in details)
    assert abs(observed - (len(failures) - before)) <= 2  # the first and the last may fall outside of the run


@pytest.fixture
def mock_robots(monkeypatch, tmp_path):
    """lerobot's module of its mock robot."""
    pytest.importorskip("lerobot", reason="lerobot is not installed")
    source = os.environ.get("LEROBOT_SOURCE")
    if not source:
        pytest.skip("LEROBOT_SOURCE does not name a checkout of lerobot, where its mock robot is")
    monkeypatch.setenv("HF_LEROBOT_CALIBRATION", str(tmp_path))  # robots make a folder there
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        monkeypatch.delitem(sys.modules, name)  # ours; lerobot's tests are a package of the same name
    monkeypatch.syspath_prepend(source)
    yield importlib.import_module("tests.mocks.mock_robot")
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]


def test_lerobots_own_mock_robot_is_driven(mock_robots):
    config = mock_robots.MockRobotConfig(n_motors=3, random_values=False, static_values=[10.0, 20.0, 30.0])
    mock = mock_robots.MockRobot(config)
    sent = []
    original = mock.send_action
    mock.send_action = lambda action: sent.append(original(action))
    low = np.full(3, -100.0)
    robot = LeRobotRobot(mock, rate_hz=100, action_low=low, action_high=-low, safe_action="hold")
    assert robot.spec.name == "mock_robot"
    assert mock.is_connected

    def plan(request):
        return np.tile(request.observation["observation"][-1] + 1, (8, 1))

    loop = ControlLoop(
        robot, ToyPolicy(action_dim=3), ToyWorker(1, plan), ControlConfig(priority=False, wait_share=0.0)
    )
    status = loop.run(50)
    robot.close()
    assert status.stopped == "finished"
    assert not mock.is_connected
    assert loop.events.counts[Event.ROBOT_ERROR] == 0
    assert len(sent) >= 40
    assert sent[-1] == {"motor_1.pos": 11.0, "motor_2.pos": 21.0, "motor_3.pos": 31.0}
