"""The gate: whatever happened before, what the robot gets is within limits counted from what it was sent."""

from __future__ import annotations

import numpy as np
import pytest
from control_toys import A, ToyClock, ToyRobot

from flowpolicy.control.events import EventLog
from flowpolicy.control.robot import RobotError
from flowpolicy.control.safety import SafetyConfig, SafetyGate
from flowpolicy.errors import ConfigError

PERIOD = 0.01


def build(safe_action="zero", dead_man=None, **limits):
    robot = ToyRobot(ToyClock(), safe_action=safe_action, bound=2.0)
    return robot, SafetyGate(robot, SafetyConfig(**limits), EventLog(), PERIOD, dead_man)


def full(value):
    return np.full(A, value, np.float32)


@pytest.mark.parametrize("safe_action", ["zero", "hold", (0.2, 0.2)])
@pytest.mark.parametrize("limits", [{"velocity_limit": 1.0}, {"jerk_limit": 1e4}])
@pytest.mark.parametrize("pause", ["none", "dead man", "episode", "raises", "unsent"])
def test_what_follows_a_pause_is_counted_from_what_was_sent(safe_action, limits, pause):
    held = {"now": True}
    robot, gate = build(safe_action, lambda: held["now"], **limits)
    gate.send(full(0.5), 0)
    if pause == "episode":
        gate.forget_hold()
    elif pause in ("raises", "unsent"):
        error = OSError("cable") if pause == "raises" else RobotError("busy", unsent=True)
        robot.on_act = lambda action: (_ for _ in ()).throw(error)
        assert gate.send(full(0.51), 1) == (None, False)
        robot.on_act = lambda action: None
        assert gate.send(full(0.51), 1)[1] == (pause == "unsent")  # else the safe action makes sure first
    else:
        held["now"] = pause != "dead man"
        gate.send(None if pause == "none" else full(0.6), 1)
        held["now"] = True
    for tick in range(2, 30):
        gate.send(full(1.0), tick)
    path = np.array(robot.commands)
    # The safe action itself may be immediate: what is judged begins with it.
    after = path if pause in ("episode", "unsent") or safe_action == "hold" else path[1:]
    if "velocity_limit" in limits:
        assert np.abs(np.diff(after, axis=0)).max() <= 0.01 + 1e-6
    padded = np.concatenate([after[:1], after[:1], after]).astype(np.float64)
    if "jerk_limit" in limits:
        assert np.abs(np.diff(padded, n=3, axis=0)).max() <= 0.01 + 1e-6
    assert after[-1][0] > after[0][0] + 0.1  # and it does go on


def test_the_limits_never_contradict_each_other():
    rng = np.random.default_rng(0)
    for jerk, velocity in ((1e5, 20.0), (1e3, 2.0), (3e4, 1.0), (1e6, 0.5)):
        robot, gate = build(jerk_limit=jerk, velocity_limit=velocity)
        target = np.zeros(A)
        for tick in range(500):
            kind = tick // 100
            target = rng.uniform(-4, 4, A) if kind % 2 else np.clip(target + rng.normal(0, 0.1, A), -3, 3)
            gate.send(target.astype(np.float32), tick)
        path = np.array(robot.commands, np.float64)
        rounding = 4 * np.finfo(np.float32).eps * 2.0
        assert np.abs(path).max() <= 2.0
        assert np.abs(np.diff(path, axis=0)).max() <= velocity * PERIOD + rounding
        assert np.abs(np.diff(path, n=3, axis=0)).max() <= jerk * PERIOD**3 + rounding
        assert np.ptp(path) > 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_robot_without_finite_bounds_or_rate_is_refused(value):
    with pytest.raises(ConfigError, match=r"finite|lower bound"):
        ToyRobot(ToyClock(), bound=value)
    with pytest.raises(ConfigError, match="rate_hz"):
        ToyRobot(ToyClock(), rate_hz=value)


@pytest.mark.parametrize("name", ["velocity_limit", "jerk_limit", "max_observation_age_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_limit_that_is_none_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        SafetyConfig(**{name: value})
