"""Adroit: observations, rewards and the success flag are those of the human recordings."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("gymnasium_robotics")

LIMIT = 300


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _episodes(shared_data: Path) -> list[dict[str, Any]]:
    content = (shared_data / "adroit_door_human" / "door-v0_demos.pickle").read_bytes()
    return _ArraysOnly(io.BytesIO(content)).load()


def _replay(env: Any, episode: dict[str, Any]) -> tuple[np.ndarray, float, list[bool]]:
    observation, info = env.reset(seed=0, options={"initial_state_dict": episode["init_state_dict"]})
    assert info["success"] is False
    observations, total, successes = [], 0.0, []
    for action in episode["actions"]:
        assert observation.dtype == np.float32
        observations.append(observation)
        observation, reward, _, _, info = env.step(action)
        total += reward
        successes.append(info["success"])
    return np.stack(observations), total, successes


def test_replay_reproduces_observations_and_returns(shared_data: Path) -> None:
    env = gymnasium.make("flowpolicy_envs:flowpolicy/AdroitDoor-v1", max_episode_steps=LIMIT)
    for episode in _episodes(shared_data)[:3]:
        observations, total, _ = _replay(env, episode)
        assert observations.shape == episode["observations"].shape
        # The last entry is a flag, -1 or 1, that flips a step early or late.
        error = np.abs(observations - episode["observations"])[:, :-1]
        assert error.mean() < 0.05
        assert np.median(error) < 0.01
        assert total == pytest.approx(episode["rewards"].sum(), rel=0.05)


def test_success_is_reached_before_the_limit(shared_data: Path) -> None:
    env = gymnasium.make("flowpolicy_envs:flowpolicy/AdroitDoor-v1", max_episode_steps=LIMIT)
    episodes = _episodes(shared_data)
    assert max(len(episode["actions"]) for episode in episodes) == LIMIT
    _, _, successes = _replay(env, episodes[11])
    assert all(isinstance(success, bool) for success in successes)
    assert any(successes)
    assert not successes[0]
    _, _, successes = _replay(env, episodes[0])  # its recording stops with the door not yet fully open
    assert not any(successes)


def test_success_may_end_an_episode(shared_data: Path) -> None:
    env = gymnasium.make(
        "flowpolicy_envs:flowpolicy/AdroitDoor-v1",
        max_episode_steps=LIMIT, reward_type="sparse", ends_at_success=True,
    )  # fmt: skip
    episode = _episodes(shared_data)[11]
    env.reset(options={"initial_state_dict": episode["init_state_dict"]})
    for action in episode["actions"]:
        _, reward, terminated, _, info = env.step(action)
        assert terminated == info["success"]
        assert reward == pytest.approx(10.0 if terminated else -0.1)
        if terminated:
            break
    assert terminated


def test_the_time_limit_is_the_one_asked_for() -> None:
    env = gymnasium.make("flowpolicy_envs:flowpolicy/AdroitDoor-v1", max_episode_steps=LIMIT)
    env.reset(seed=0)
    action = np.zeros(28, dtype=np.float32)
    ends = [env.step(action)[2:4] for _ in range(LIMIT)]
    assert not any(terminated or truncated for terminated, truncated in ends[:-1])
    assert ends[-1] == (False, True)


def test_actions_outside_the_range_are_clipped() -> None:
    outcomes = []
    for scale in (1.0, 3.0):
        env = gymnasium.make("flowpolicy_envs:flowpolicy/AdroitDoor-v1", disable_env_checker=True)
        env.reset(seed=0)
        outcomes.append(env.step(np.full(28, scale, dtype=np.float32))[0])
    np.testing.assert_array_equal(*outcomes)
