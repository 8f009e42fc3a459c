"""Before a robot moves for the first time: what is refused, and the slow move to the first command."""

from __future__ import annotations

import numpy as np
import pytest
from control_toys import T, ToyClock, ToyPolicy, ToyWorker

from flowpolicy.control.checklist import CheckList
from flowpolicy.control.config import ControlConfig
from flowpolicy.control.loop import ControlLoop
from flowpolicy.control.robot import RobotSpec
from flowpolicy.control.robots.rehearsal import Rehearsal
from flowpolicy.control.safety import SafetyConfig
from flowpolicy.errors import TaskError

RATE, LIMIT = 50.0, 1.0


class Arm:
    """Two joints that follow their commands at once, unless they are ``stuck``, and a camera."""

    def __init__(self, clock, pose=(0.0, 0.0)):
        low = np.full(2, -1, np.float32)
        shapes = {"observation": (3,), "front": (4, 4, 3)}
        self.spec = RobotSpec("arm", shapes, low, -low, RATE, "hold", action_names=("lift", "turn"))
        self.clock, self.pose = clock, np.float32(pose)
        self.commands, self.looks = [], 0
        self.stuck = self.frozen = self.blind = False
        self.age = 0.01

    def observe(self):
        if self.blind:
            raise ConnectionError("no status packet")
        self.looks += not self.frozen
        return {
            "observation": np.zeros(3, np.float32), "front": np.full((4, 4, 3), self.looks % 256, np.uint8),
            "present_pose": self.pose.copy(), "timestamp": self.clock.now() - self.age,
        }  # fmt: skip

    def act(self, action):
        self.commands.append(np.array(action))
        if not self.stuck:
            self.pose = np.array(action)

    def close(self):
        pass


class Slow(ToyWorker):
    """A worker whose chunks take some time."""

    def __init__(self, clock, seconds, first):
        super().__init__(1, lambda request: np.tile(np.float32(first), (T, 1)))
        self.clock, self.seconds = clock, seconds

    def poll(self, timeout=0.0):
        self.clock.time += self.seconds
        return super().poll(timeout)


class Case:
    """A list that holds, unless a setting says otherwise."""

    def __init__(
        self, *, pose=(0.0, 0.0), first=(0.01, 0.0), limit=LIMIT, seconds=0.005, trained=RATE,
        rehearsal=False, complete=True,
    ):  # fmt: skip
        self.clock = ToyClock()
        self.arm = Arm(self.clock, pose)
        self.robot = Rehearsal(self.arm) if rehearsal else self.arm
        policy = ToyPolicy(observation=(3,), front=(4, 4, 3))
        policy.spec.task["control_hz"] = trained
        self.worker = Slow(self.clock, seconds, first)
        config = ControlConfig(priority=False, safety=SafetyConfig(velocity_limit=limit))
        self.loop = ControlLoop(self.robot, policy, self.worker, config, clock=self.clock)
        self.list = CheckList(self.loop, policy, self.worker, complete=complete, rehearsal=rehearsal)

    def steps(self):
        """Changes of the command from where the arm was, in what the velocity limit allows in a tick."""
        path = np.stack([np.zeros(2), *self.arm.commands])
        return np.abs(np.diff(path, axis=0)) / (LIMIT / RATE)


def test_a_robot_near_its_first_command_is_not_moved_by_the_list():
    case = Case()
    checks = case.list.go()
    assert [check.name for check in checks] == [
        "rate", "observations", "cameras", "inference", "limits", "first command",
    ]  # fmt: skip
    assert all(check.ok for check in checks)
    assert case.arm.commands == []


@pytest.mark.parametrize("jerk", [None, 500.0])
def test_a_far_first_command_is_reached_slowly_and_along_a_straight_line(jerk):
    case = Case(first=(0.8, -0.4))
    if jerk is not None:
        safety = SafetyConfig(velocity_limit=LIMIT, jerk_limit=jerk)
        config = ControlConfig(priority=False, safety=safety)
        case.loop = ControlLoop(case.robot, case.list.policy, case.worker, config, clock=case.clock)
        case.list.loop = case.loop
    checks = case.list.go()
    assert "moved there in 1.6 s" in checks[-1].found
    assert case.steps().max() <= (0.501 if jerk is None else 1.001)
    np.testing.assert_allclose(case.arm.pose, [0.8, -0.4], atol=1e-6)
    if jerk is None:
        path = np.stack(case.arm.commands)
        np.testing.assert_allclose(path[:, 1], -0.5 * path[:, 0], atol=1e-6)


def test_the_loop_goes_on_from_there_within_the_limits():
    case = Case(first=(0.5, 0.0))
    case.list.go()
    case.worker.sampler = lambda request: np.tile(np.float32([-1, 1]), (T, 1))
    case.worker.seconds = 0.0
    case.loop.run(20)
    assert case.steps().max() <= 1.001


def test_the_first_command_of_the_loop_is_limited_from_the_present_pose():
    case = Case()
    case.list.go()
    case.worker.sampler = lambda request: np.tile(np.float32([1, 1]), (T, 1))
    case.worker.seconds = 0.0
    case.loop.run(3)
    assert 0 < case.steps().max() <= 1.001


def blind(case):
    case.arm.blind = True


def old(case):
    case.arm.age = 0.3


def frozen(case):
    case.arm.frozen = True


def stuck(case):
    case.arm.stuck = True


def broken(case):
    case.worker.sampler = lambda request: np.full((T, 2), np.nan, np.float32)


@pytest.mark.parametrize(
    ("settings", "prepare", "words", "is_safety"),
    [
        ({"limit": None}, None, r"velocity_limit=UNITS_PER_SECOND", True),
        ({"trained": 10.0}, None, r"50 Hz, the demonstrations' 10 Hz; give control.rate_hz=10", False),
        ({"seconds": 0.2}, None, r"a chunk takes 200.0 ms .* leaves room for 4 ticks", False),
        ({}, blind, r"too old at 50 of 50 ticks.*no status packet", True),
        ({}, old, r"at most 300 ms old \(limit 250 ms\)", True),
        ({}, frozen, r"front showed the same picture", False),
        ({}, broken, r"a chunk with NaN or infinity", True),
        ({"pose": (1.5, 0.0)}, None, r"lift is at 1.5, outside of its limits -1 to 1", True),
        ({"first": (0.8, 0.0)}, stuck, r"lift did not follow", True),
        ({"first": (0.9, 0.0), "limit": 0.01}, None, r"too far for a slow move", True),
    ],
)
def test_what_does_not_hold_is_refused(settings, prepare, words, is_safety):
    for complete in (True, False):
        case = Case(**settings, complete=complete)
        if prepare is not None:
            prepare(case)
        if complete or is_safety:
            with pytest.raises(TaskError, match=words) as refused:
                case.list.go()
            assert ("checklist=false" in str(refused.value)) is not is_safety
            assert prepare is stuck or case.arm.commands == []
        else:
            assert all(check.ok for check in case.list.go())


@pytest.mark.parametrize("rate", [50.0, 20.0])
def test_a_moment_in_which_the_program_stood_still_is_not_held_against_the_robot(rate, monkeypatch):
    """The arm is heard only while the list sleeps; once the whole program does nothing for 0.31 s."""
    monkeypatch.setattr(f"{__name__}.RATE", rate)
    case = Case(first=(0.01, 0.0), trained=rate)
    heard = [case.clock.time]
    observe, sleep = case.arm.observe, case.clock.sleep_until

    def sleep_until(moment):
        if moment > case.clock.time:
            heard[0] = moment
        sleep(moment)

    def observe_late():
        if case.arm.looks == 10:
            case.clock.time += 0.31
        return {**observe(), "timestamp": heard[0]}

    case.clock.sleep_until, case.arm.observe = sleep_until, observe_late
    found = next(check.found for check in case.list.go() if check.name == "observations")
    assert f"in {rate:g} ticks" in found
    assert "at most 310 ms old" in found


def test_an_arm_that_goes_blind_during_the_move_is_stopped():
    case = Case(first=(0.8, 0.0))
    act = case.arm.act

    def lose(action):
        act(action)
        case.arm.blind = len(case.arm.commands) >= 10

    case.arm.act = lose
    with pytest.raises(TaskError, match="given up"):
        case.list.go()
    assert case.steps().max() <= 0.501
    np.testing.assert_array_equal(case.arm.commands[-1], case.arm.commands[-5])  # it holds


def test_a_robot_without_a_pose_says_so_and_is_free():
    case = Case(first=(0.8, 0.0), limit=None)
    observe = case.arm.observe
    case.arm.observe = lambda: {key: value for key, value in observe().items() if key != "present_pose"}
    checks = case.list.go()
    assert "does not say its present pose" in checks[-1].found
    assert case.arm.commands == []


def test_a_rehearsal_sends_nothing_and_refuses_nothing():
    case = Case(first=(0.8, 0.0), trained=10.0, rehearsal=True)
    checks = case.list.go()
    assert [check.name for check in checks if not check.ok] == ["rate"]
    assert "it would be moved there" in checks[-1].found
    case.worker.seconds = 0.0
    case.loop.run(10)
    assert case.arm.commands == []
    case.robot.first = case.list.first
    first, second = case.robot.findings(RATE).rows()
    assert first["name"] == "lift"
    # What the policy asks for, beside where the arm is; the commands themselves are held to the limit.
    assert (first["present"], first["first"]) == (0.0, pytest.approx(0.8))
    assert 0 < first["max"] < 0.8
    assert first["largest_speed"] == pytest.approx(LIMIT, rel=0.02)
    assert second["largest_step"] == 0.0
    assert "| lift | " in case.robot.findings(RATE).table()
