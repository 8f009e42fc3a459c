"""Pairs are alike until they part, and a store that was broken off becomes what it would have been."""

import dataclasses
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from toy_training import toy_trainer

from flowpolicy import DataError, TaskError
from flowpolicy.data.store import read_demonstrations
from flowpolicy.preferences import collection
from flowpolicy.preferences.collection import CollectionConfig, collect_preferences, small
from flowpolicy.preferences.pairs import CHUNK, CHUNK_STEP, FRAME, read_pairs

TASK = {"name": "toy", "env_id": "Counting-v0", "obs_horizon": 2, "execute_horizon": 2, "control_hz": 60.0}


class Counting(gymnasium.Env):
    """What is observed is where an episode has begun, and the sum of all actions; it ends in step 14."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
    metadata: ClassVar = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.total, self.steps = self.np_random.normal(), 0.0, 0
        return self._observation(), {}

    def step(self, action):
        self.total, self.steps = self.total + float(action[0]), self.steps + 1
        return self._observation(), self.total, self.steps == 14, False, {}

    def render(self):
        return np.full((8, 12, 3), self.steps, np.uint8)

    def _observation(self):
        return np.array([self.start, self.total, self.steps], np.float32)


@pytest.fixture(scope="module", autouse=True)
def counting():
    gymnasium.register("Counting-v0", Counting, disable_env_checker=True, order_enforce=False)
    yield
    del gymnasium.registry["Counting-v0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    policy = toy_trainer("flow_matching", steps=1).policy
    config = dataclasses.replace(policy.config, obs_horizon=2)
    two = type(policy)(config)
    two.load_normalizers(policy)
    return two.save(tmp_path_factory.mktemp("policy") / "checkpoint")


@pytest.fixture
def config(tmp_path, checkpoint):
    return CollectionConfig(
        checkpoint=str(checkpoint), out=str(tmp_path / "toy.zarr"), pairs=4, segment_steps=5, latest_start=40,
        num_envs=4, device="cpu",
    )  # fmt: skip


def test_segments_begin_at_one_state_and_differ_from_there(config):
    path, task = collect_preferences(dataclasses.replace(config, video=True), TASK)
    pairs, frames = read_pairs(path), read_demonstrations(path, [FRAME]).arrays[FRAME]
    arrays, starts = pairs.demos.arrays, []
    assert len(pairs) == 4
    assert task.name == "toy"
    for number in range(4):
        first, second = (pairs.segment(2 * number + side) for side in range(2))
        begin = first.observation["observation"][0]
        np.testing.assert_array_equal(begin, second.observation["observation"][0])
        assert not np.array_equal(first.action, second.action)
        starts.append(int(begin[2]))
        assert len(first.reward) == len(second.reward) == min(5, 14 - starts[-1])
        for episode in (2 * number, 2 * number + 1):
            rows = pairs.rows(episode)
            before = rows.start - int(pairs.demos.episode_starts[episode])
            assert before == min(1, starts[-1])  # so that the first history is whole
            assert (arrays[CHUNK_STEP][rows] == np.arange(rows.stop - rows.start) % 2).all()
            steps, executed = pairs.decisions(episode)
            assert executed.sum() == rows.stop - rows.start
            for step, count in zip(steps, executed, strict=True):
                chunk, action = arrays[CHUNK][step], arrays["action"][step : step + count]
                np.testing.assert_array_equal(np.clip(chunk[:count], -2, 2), action)
            seen = frames[rows][::2]  # at 60 Hz every other step is one
            assert seen[:, 0, 0, 0].tolist() == [starts[-1] + 2 * k for k in range(len(seen))]
            total = arrays["observation"][rows][:, 1]
            np.testing.assert_allclose(np.diff(total), arrays["action"][rows][:-1, 0], atol=1e-5)
    assert all(start % 2 == 0 and start < 14 for start in starts)
    assert len(set(starts)) > 1
    ends = arrays["terminated"] | arrays["truncated"]
    assert np.flatnonzero(ends).tolist() == (pairs.demos.episode_ends - 1).tolist()


def test_a_store_that_was_broken_off_becomes_the_unbroken_one(tmp_path, config, monkeypatch):
    monkeypatch.setattr(collection, "SYNCED_EVERY_S", -1.0)
    config = dataclasses.replace(config, pairs=3)
    whole, _ = collect_preferences(config, TASK)
    broken = dataclasses.replace(config, out=str(tmp_path / "broken.zarr"))
    add = collection.RecordedStore.append

    def killed(self, rows):
        if self.num_episodes == 3:
            raise KeyboardInterrupt
        add(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(collection.RecordedStore, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            collect_preferences(broken, TASK)
    with pytest.raises(DataError, match="with another 'preferences'; choose another name"):
        collect_preferences(dataclasses.replace(broken, seed=1), TASK)
    path, _ = collect_preferences(broken, TASK)
    first, second = (read_demonstrations(store) for store in (whole, path))
    assert first.episode_ends.tolist() == second.episode_ends.tolist()
    for key, values in first.arrays.items():
        np.testing.assert_allclose(values, second.arrays[key], atol=1e-5, err_msg=key)
    with pytest.raises(DataError, match="exists already"):
        collect_preferences(config, TASK)


def test_frames_become_small_by_the_mean_of_squares():
    frame = np.arange(4 * 482, dtype=np.uint8).reshape(4, 482, 1).repeat(3, 2)
    shrunk = small(frame)
    assert shrunk.shape == (1, 160, 3)
    assert shrunk[0, 0, 0] == int(frame[:3, :3, 0].mean())


def test_an_environment_without_pictures_is_refused(config, monkeypatch):
    monkeypatch.setattr(Counting, "render", lambda self: None)
    with pytest.raises(TaskError, match="leave out video=true"):
        collect_preferences(dataclasses.replace(config, video=True), TASK)
