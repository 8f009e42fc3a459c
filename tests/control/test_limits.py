"""The jerk limiter: never beyond its limit, arrives nearly as fast as can be, and never runs away."""

from __future__ import annotations

import numpy as np
import pytest

from flowpolicy.control.limits import JerkLimiter


def follow(targets, limit, velocity=None):
    limiter = JerkLimiter(np.array([limit]), None if velocity is None else np.array([velocity]))
    sent = [np.zeros(1)] * 3
    for target in targets:
        sent.insert(0, limiter(np.array([target], dtype=np.float64), tuple(sent[:3])))
    return np.array(sent[::-1])[:, 0]


@pytest.mark.parametrize("limit", [1e-4, 1e-3, 1e-2, 0.1, 0.2])
def test_a_jump_is_followed_in_about_the_least_time_without_overshoot(limit):
    path = follow(np.ones(400), limit)
    assert np.abs(np.diff(path, n=3)).max() <= limit * (1 + 1e-9)
    assert path.max() <= 1.02
    ideal = (32 / limit) ** (1 / 3)  # rest to rest over a distance of 1 with jerk +j, -j, -j, +j
    arrived = np.flatnonzero(np.abs(path - 1) > 0.02)[-1]
    assert arrived <= 1.6 * ideal + 4
    assert path[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("limit", [1e-3, 1e-2, 0.1, 0.5, 2.0])
def test_noise_never_makes_it_run_away(limit):
    targets = np.random.default_rng(0).normal(size=3000)
    path = follow(targets, limit)
    assert np.abs(np.diff(path, n=3)).max() <= limit * (1 + 1e-9)
    assert np.abs(path).max() <= 4 * np.abs(targets).max()  # clipped alone, it leaves for the thousands


def test_what_is_within_the_limit_passes_unchanged():
    steps = np.arange(500)
    smooth = 1 - np.cos(0.05 * steps)  # starts at rest; third difference at most 0.05^3
    path = follow(smooth, 1.5e-3)
    np.testing.assert_array_equal(path[3:], smooth)


def test_the_approach_keeps_to_the_velocity_limit():
    path = follow(np.ones(600), 1e-3, velocity=0.02)
    assert np.abs(np.diff(path)).max() <= 0.02 * 1.05
    assert path[-1] == pytest.approx(1.0)
