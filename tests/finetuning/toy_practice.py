"""An environment of a few microseconds a step, and a small policy for it."""

import contextlib
import os
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.env_util import make_vec_env

from flowpolicy.finetuning.environments import LocalChunks
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.stable_baselines3 import ChunkedVecEnv
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig


class Reach(gym.Env):
    """Reward is highest where the action equals the observed target; ten steps an episode."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, broken_at=None, what="reward"):
        self.broken_at, self.what, self.total = broken_at, what, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target, self.steps = self.np_random.uniform(-0.5, 0.5, 2).astype(np.float32), 0
        return self.target.copy(), {}

    def step(self, action):
        self.steps, self.total = self.steps + 1, self.total + 1
        reward = 1.0 - float(np.abs(action - self.target).mean())
        observation = self.target.copy()
        if self.total == self.broken_at:
            reward = float("nan") if self.what == "reward" else reward
            observation = observation * np.nan if self.what == "observation" else observation
        return observation, reward, False, self.steps == 10, {}


class Mortal(Reach):
    """Ends its process once, at its 30th step, if the file that it leaves is not there yet."""

    def __init__(self, marker):
        super().__init__()
        self.marker = Path(marker)

    def step(self, action):
        if self.total == 30:
            with contextlib.suppress(FileExistsError):  # of several, the first one dies
                self.marker.touch(exist_ok=False)
                os._exit(9)
        return super().step(action)


gym.register("toy/Reach-v0", Reach)
gym.register("toy/Mortal-v0", Mortal)


class CloneableReach(Reach):
    """One whose states others can go on from."""

    def clone_state(self):
        return self.target.copy(), self.steps

    def restore_state(self, state):
        target, self.steps = state
        self.target = target.copy()


class Unwilling(CloneableReach):
    """One that cannot, when it comes to it."""

    def restore_state(self, state):
        raise ValueError("not now")


class Unsendable(CloneableReach):
    """One whose states belong to its process."""

    def clone_state(self):
        return threading.Lock()


class Open(gym.Wrapper):
    """A wrapper that seems to have all that is in it."""

    def __getattr__(self, name):
        return getattr(self.env, name)


def grouped(count=4, workers=0):
    """Environments that can be put to one state, in this process or in others."""
    makers = [CloneableReach] * count
    if workers:
        return ChunkedVecEnv.in_processes(makers, workers)
    return ChunkedVecEnv(LocalChunks([make() for make in makers], ("observation",), 1))


def make_policy(obs_horizon=1, objective="shortcut", model=None, **settings):
    torch.manual_seed(0)
    model = model or TransformerConfig(width=16, depth=1, num_heads=2)
    config = PolicyConfig({"name": objective}, model, {"observation": (2,)}, 2, obs_horizon, 4, 4, **settings)
    policy = FlowPolicy(config)
    for parameter in policy.network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return policy.eval()


def make(env=None, policy=None, **settings):
    env = make_vec_env(Reach, n_envs=4, seed=0) if env is None else env
    defaults = {"num_steps": 2, "n_steps": 16, "batch_size": 32, "n_epochs": 2, "critic_warmup": 0, "seed": 0}
    return ReinFlow(policy or make_policy(), env, **{**defaults, **settings})
