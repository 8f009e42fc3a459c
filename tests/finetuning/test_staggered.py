"""First episodes of unequal length."""

import gymnasium as gym
import pytest

from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.task import Task
from flowpolicy.finetuning.staggered import CutFirstEpisode, make_staggered


class Endless(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, falls_at=None):
        self.falls_at = falls_at

    def reset(self, *, seed=None, options=None):
        self.at = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.at += 1
        return self.observation_space.sample(), 0.0, self.at == self.falls_at, False, {}


def episode(env):
    env.reset(seed=0)
    for length in range(1, 301):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            return length, terminated, truncated
    return None


def test_only_the_first_episode_is_cut_and_it_is_a_time_limit():
    env = gym.wrappers.TimeLimit(Endless(), 100)
    assert [episode(env := CutFirstEpisode(env, 30)), episode(env), episode(env)] == [
        (30, False, True), (100, False, True), (100, False, True),
    ]  # fmt: skip


def test_an_episode_that_ends_by_itself_is_the_first_one():
    env = CutFirstEpisode(gym.wrappers.TimeLimit(Endless(falls_at=7), 100), 30)
    assert episode(env) == episode(env) == (7, True, False)
    assert episode(CutFirstEpisode(Endless(falls_at=30), 30)) == (30, True, False)


def test_the_environments_of_a_task_are_spread_over_its_episode():
    task = Task("pendulum", "Pendulum-v1", action_horizon=1, execute_horizon=1)
    lengths = []
    for number in range(4):
        env = make_staggered(task, number, 4)
        lengths.append([episode(env)[0], episode(env)[0]])
        env.close()
    assert lengths == [[50, 200], [100, 200], [150, 200], [200, 200]]


def test_without_a_time_limit_there_is_nothing_to_spread():
    gym.register("Endless-v0", Endless)
    try:
        with pytest.raises(ConfigError, match="no time limit"):
            make_staggered(Task("endless", "Endless-v0"), 0, 2)
    finally:
        del gym.registry["Endless-v0"]
