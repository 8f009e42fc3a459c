"""Fetch: the goal is in the observation, success ends an episode, and the script carries cubes both ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("gymnasium_robotics")

from flowpolicy_envs.fetch import PickAndPlaceExpert  # noqa: E402
from flowpolicy_envs.scripted import play  # noqa: E402


@pytest.fixture(scope="module")
def env() -> Iterator[Any]:
    made = gymnasium.make("flowpolicy_envs:flowpolicy/FetchPickAndPlace-v0")
    yield made
    made.close()


def test_the_observation_holds_the_wrapped_one_and_the_goal(env: Any) -> None:
    observation, _ = env.reset(seed=2)
    wrapped = env.unwrapped._get_obs()
    assert observation.dtype == np.float32
    np.testing.assert_allclose(observation[:25], wrapped["observation"], atol=1e-6)
    np.testing.assert_allclose(observation[25:], wrapped["desired_goal"], atol=1e-6)
    np.testing.assert_allclose(observation[3:6], wrapped["achieved_goal"], atol=1e-6)
    assert not np.array_equal(observation[25:], env.reset(seed=3)[0][25:])
    np.testing.assert_array_equal(env.reset(seed=2)[0], observation)


def test_the_script_solves_it_and_success_ends_it(env: Any) -> None:
    attempts = [play(env, PickAndPlaceExpert(), seed) for seed in range(20)]
    solved = [attempt for attempt in attempts if attempt.episode.success]
    assert len(solved) >= 18
    assert {attempt.way for attempt in solved} == {"straight", "lift"}
    for attempt in solved:
        assert attempt.episode.terminated
        assert attempt.episode.total == 1.0
        last = attempt.episode.observation["observation"][-1]
        assert np.linalg.norm(last[3:6] - last[25:]) < 0.1  # one step before it was reached


def test_an_episode_without_success_is_cut_by_the_limit(env: Any) -> None:
    env.reset(seed=1)
    ends = [env.step(np.zeros(4, np.float32))[1:4] for _ in range(env.spec.max_episode_steps)]
    assert ends[-1] == (0.0, False, True)
    assert all(end == (0.0, False, False) for end in ends[:-1])
