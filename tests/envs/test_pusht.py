"""Push-T: the observation is the recorded one, and the simulator replays the human episodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flowpolicy.data.store import read_demonstrations
from flowpolicy.errors import DataError, TaskError

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("gym_pusht")

from flowpolicy_envs.pusht import add_keypoint_observation, keypoints_from_state  # noqa: E402


def _store(shared_data: Path) -> Path:
    return shared_data / "pusht" / "pusht_cchi_v7_replay.zarr.zip"


def _make():
    return gymnasium.make("flowpolicy_envs:flowpolicy/PushT-v0", max_episode_steps=1000)


def test_keypoints_equal_the_recorded_ones_wherever_the_block_rests(shared_data: Path) -> None:
    demos = read_demonstrations(_store(shared_data), keys=["state", "keypoint", "n_contacts"])
    state, recorded = demos.arrays["state"], demos.arrays["keypoint"].reshape(demos.num_steps, 18)
    error = np.abs(keypoints_from_state(state)[:, 2:] - recorded).max(axis=1)
    touched = demos.arrays["n_contacts"][:, 0] > 0
    # While the block is pushed the recording took pose and keypoints a moment apart, so that only the
    # bulk of those frames agrees; without contact every frame but one does.
    assert np.quantile(error[~touched], 0.999) < 1e-2
    assert (error[~touched] > 1e-2).sum() <= 1
    assert np.median(error[touched]) < 1e-2


def test_keypoints_of_a_moved_block_move_with_it() -> None:
    rng = np.random.default_rng(0)
    state = rng.uniform(0, 400, size=(8, 5))
    turned, shifted = state.copy(), state.copy()
    turned[:, 4] += 2 * np.pi
    shifted[:, 2:4] += [3.0, -5.0]
    points = keypoints_from_state(state)
    np.testing.assert_allclose(keypoints_from_state(turned), points, atol=1e-3)
    moved = keypoints_from_state(shifted) - points
    np.testing.assert_allclose(moved[:, :2], 0.0)
    np.testing.assert_allclose(
        moved[:, 2:].reshape(8, 9, 2), np.broadcast_to([3.0, -5.0], (8, 9, 2)), atol=1e-3
    )


def test_environment_and_transform_compute_the_same_observation() -> None:
    env = _make()
    observation, _ = env.reset(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(20):
        state = env.get_wrapper_attr("state")
        transformed = add_keypoint_observation({"state": state[None]})["observation"][0]
        np.testing.assert_array_equal(observation, transformed)
        observation, *_ = env.step(rng.uniform(0, 512, 2).astype(np.float32))
    assert observation.dtype == np.float32


def test_human_episodes_replay_exactly(shared_data: Path) -> None:
    demos = read_demonstrations(_store(shared_data), keys=["state"])
    env = _make()
    covered = []
    for episode in range(0, demos.num_episodes, 20):
        rows = slice(demos.episode_starts[episode], demos.episode_ends[episode])
        states, actions = demos.arrays["state"][rows], demos.arrays["action"][rows]
        _, info = env.reset(seed=0, options={"state": states[0]})
        best = info["coverage"]
        for state, action in zip(states, actions, strict=True):
            found = env.get_wrapper_attr("state")
            assert np.abs(found[:4] - state[:4]).max() < 1e-3
            assert abs((found[4] - state[4] + np.pi) % (2 * np.pi) - np.pi) < 1e-4
            _, reward, terminated, _, info = env.step(action)
            best = max(best, info["coverage"])
            assert info["score"] == pytest.approx(min(1.0, info["coverage"] / 0.95))
            assert reward == pytest.approx(info["score"])
            assert terminated == info["success"] == (info["coverage"] > 0.95)
            if terminated:
                break
        covered.append(best)
    assert np.mean(covered) == pytest.approx(0.90, abs=0.03)


def test_a_start_state_is_taken_as_given() -> None:
    start = np.array([100.0, 120.0, 300.0, 250.0, 2.5])
    env = _make()
    observation, info = env.reset(seed=0, options={"state": start})
    np.testing.assert_allclose(env.get_wrapper_attr("state"), start, atol=1e-6)
    np.testing.assert_allclose(observation, keypoints_from_state(start[None])[0], atol=1e-3)
    assert not info["success"]


def test_the_goal_pose_is_a_success() -> None:
    env = _make()
    _, info = env.reset(seed=0, options={"state": np.array([50.0, 50.0, 256.0, 256.0, np.pi / 4])})
    assert info["coverage"] == pytest.approx(1.0)
    assert info["success"]
    assert info["score"] == 1.0


def test_bad_states_are_refused_in_one_sentence() -> None:
    with pytest.raises(DataError, match=r"\(steps, 5\)"):
        keypoints_from_state(np.zeros((3, 4)))
    with pytest.raises(DataError, match="'state'"):
        add_keypoint_observation({"action": np.zeros((3, 2))})
    with pytest.raises(TaskError, match="five finite numbers"):
        _make().reset(options={"state": [1.0, np.nan, 0.0, 0.0, 0.0]})
