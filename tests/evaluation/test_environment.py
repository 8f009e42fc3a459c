"""Every environment in one form."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from flowpolicy.errors import TaskError
from flowpolicy.evaluation.environment import StandardEnvironment, standard
from flowpolicy.evaluation.episodes import EpisodeTally, columns


class Any(gymnasium.Env):
    """Observes what it is told to, and keeps the action it got."""

    def __init__(self, observation, space, action=None):
        self.observation, self.observation_space = observation, space
        self.action_space = action or spaces.Box(
            np.array([-1.0, 0.0]), np.array([1.0, 2.0]), dtype=np.float64
        )

    def reset(self, *, seed=None, options=None):
        return self.observation, {}

    def step(self, action):
        self.action = action
        return self.observation, 1.0, False, False, {"success": True}


def box(shape, dtype=np.float64):
    return spaces.Box(0, 255, shape, dtype)


def test_a_box_is_the_key_observation_in_float32():
    env = StandardEnvironment(Any(np.arange(3.0), box((3,))))
    first, _ = env.reset()
    assert first.keys() == {"observation"}
    assert first["observation"].dtype == np.float32
    assert env.observation_space.contains(first)
    assert standard(env) is env


def test_a_dictionary_keeps_its_arrays_and_integers_stay():
    offered = {
        "pose": box((2,)), "image": box((4, 4, 3), np.uint8), "count": box((1,), np.int64),
        "words": spaces.Text(5), "choice": spaces.Discrete(2),
    }  # fmt: skip
    observation = {
        "pose": np.ones(2), "image": np.zeros((4, 4, 3), np.uint8), "count": np.ones(1, np.int64),
        "words": "left", "choice": 1,
    }  # fmt: skip
    env = StandardEnvironment(Any(observation, spaces.Dict(offered)))
    found = env.step(np.zeros(2))[0]
    kinds = {key: array.dtype for key, array in found.items()}
    assert kinds == {"pose": np.float32, "image": np.uint8, "count": np.int64, "words": np.uint8}
    assert env.keeping(["pose"]).step(np.zeros(2))[0].keys() == {"pose"}
    assert env.step(np.zeros(2))[0].keys() == kinds.keys()


@pytest.mark.parametrize("given", [np.float32, np.float64])
def test_actions_are_held_within_their_bounds_and_come_in_their_dtype(given):
    env = StandardEnvironment(Any(np.zeros(1), box((1,))))
    env.step(np.array([-3.0, 1.5], given))
    np.testing.assert_array_equal(env.unwrapped.action, [-1.0, 1.5])
    assert env.unwrapped.action.dtype == np.float64


def test_what_does_not_fit_is_one_sentence():
    with pytest.raises(TaskError, match=r"Task 'x' takes actions Discrete\(2\); wrap it"):
        StandardEnvironment(Any(np.zeros(1), box((1,)), spaces.Discrete(2)), "Task 'x'")
    with pytest.raises(TaskError, match=r"gave 'observation' of shape \(2,\).*says \(1,\)"):
        StandardEnvironment(Any(np.zeros(2), box((1,)))).reset()
    with pytest.raises(TaskError, match=r"gave 'observation' of float64 .*says uint16"):
        StandardEnvironment(Any(np.full(1, 1.5), box((1,), np.uint16))).reset()


def test_an_episodes_success_score_and_task_are_those_of_its_infos():
    tally = EpisodeTally(2)
    for info in ({}, {"success": True, "score": 2.0}, {"success": False, "score": 1.0, "task": "lift"}):
        tally.running[1].add(0.5, info)
    tally.running[0].add(1.0, {})
    tally.end(1)
    tally.end(0)
    first, second = records = tally.pop()
    assert (first.ret, first.length, first.success, first.score, first.task) == (1.5, 3, True, 2.0, "lift")
    assert (second.success, second.score, second.task) == (None, None, "")
    assert tally.pop() == []
    assert tally.running[1].length == 0
    found = columns(records)
    assert found["success"].tolist() == [True, False]
    assert found["score"].tolist() == [2.0, -np.inf]
    assert columns(records[1:])["task"] is columns(records[1:])["success"] is None
