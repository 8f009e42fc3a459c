from unittest import mock

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from toy_practice import Reach, make, make_policy

from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.environment import standard
from flowpolicy.finetuning.offpolicy.off_policy import OffPolicy
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.stable_baselines3 import ChunkedVecEnv
from flowpolicy.runs.seeds import derived_seed


@pytest.fixture
def processes():
    env = ChunkedVecEnv.in_processes([Reach] * 4, 2)
    yield env
    env.close()


def test_single_steps_are_those_of_a_plain_vectorised_environment(processes):
    plain = make_vec_env(Reach, n_envs=4, seed=derived_seed(3, "environments"))
    processes.seed(3)
    np.testing.assert_array_equal(processes.reset(), plain.reset())
    rng = np.random.default_rng(0)
    for _ in range(25):
        actions = rng.uniform(-1, 1, (4, 2)).astype(np.float32)
        ours, theirs = processes.step(actions), plain.step(actions)
        for i in range(3):
            np.testing.assert_allclose(ours[i], theirs[i], rtol=1e-6)
        for left, right in zip(ours[3], theirs[3], strict=True):
            assert ("terminal_observation" in left) == ("terminal_observation" in right)
            if "terminal_observation" in right:
                np.testing.assert_array_equal(left["terminal_observation"], right["terminal_observation"])
                assert left["TimeLimit.truncated"] == right["TimeLimit.truncated"]
                assert left["episode"]["r"] == pytest.approx(right["episode"]["r"], abs=1e-5)
                assert left["episode"]["l"] == right["episode"]["l"] == 10


def test_reinflow_sends_whole_chunks_and_sees_the_same_experience(processes):
    ends = []
    for env in (processes, make_vec_env(Reach, n_envs=4, seed=0)):
        model = make(env)
        with mock.patch.object(model.chunks, "step", wraps=model.chunks.step) as step:
            model.learn(1)
        assert {call.args[0].shape for call in step.call_args_list} == {(4, 4, 2)}
        ends.append((model.num_timesteps, [episode["r"] for episode in model.ep_info_buffer]))
    assert ends[0][0] == ends[1][0]
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-5)
    mean, _ = evaluate_policy(make(processes), processes, n_eval_episodes=8)
    assert 0 < mean < 10


class ReachAndMore(gym.ObservationWrapper):
    """A task whose observation has a key that the policy does not take."""

    def __init__(self):
        super().__init__(Reach())
        space = self.env.observation_space
        self.observation_space = gym.spaces.Dict({"observation": space, "joint_velocities": space})

    def observation(self, observation):
        return {"observation": observation, "joint_velocities": np.zeros_like(observation)}


@pytest.mark.parametrize("kind", [ReinFlow, OffPolicy])
def test_observations_that_the_policy_does_not_take_are_left(kind):
    env = DummyVecEnv([lambda: standard(ReachAndMore())] * 4)
    settings = {"n_steps": 16, "batch_size": 32} if kind is ReinFlow else {"learning_starts": 1000}
    model = kind(make_policy(), env, num_steps=2, seed=0, **settings)
    model.learn(100)
    assert model.num_timesteps >= 100
    assert env.reset().keys() == {"observation", "joint_velocities"}


def test_what_lies_in_other_processes_is_refused(processes):
    with pytest.raises(AttributeError, match="other processes"):
        processes.get_attr("target")
    for call in (lambda: processes.set_attr("target", 0), lambda: processes.env_method("reset")):
        with pytest.raises(FlowPolicyError, match="where"):
            call()
