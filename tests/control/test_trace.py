"""A recorded trace: its observations at their own times, over and over."""

from __future__ import annotations

import numpy as np
from control_toys import ToyClock

from flowpolicy.control.robots.trace import TraceRobot


def test_observations_come_at_their_own_times_and_commands_are_kept(demos):
    clock = ToyClock()
    robot = TraceRobot(
        {"observation": demos.arrays["observation"]},
        demos.episode_ends,
        demos.arrays["action"],
        10.0,
        clock=clock,
    )
    start = clock.time
    for step in (0, 6, 7, 20, 32, 33, 40):
        clock.time = start + step / 10 + 0.031
        found = robot.observe()
        np.testing.assert_array_equal(found["observation"], demos.arrays["observation"][step % 33])
        assert abs(found["timestamp"] - (start + step / 10)) < 1e-9
        robot.act(np.zeros(2, np.float32))
    assert [step for step, _ in robot.commands] == [0, 6, 7, 20, 32, 0, 7]
    clock.time = start + 3.35  # the second lap's first episode
    assert robot.observe()["episode"] == 4
    np.testing.assert_array_equal(robot.spec.action_high, demos.arrays["action"].max(0))
