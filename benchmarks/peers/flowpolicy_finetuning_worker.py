"""Runs this package's fine-tuning on synthetic observations, for benchmarks/finetuning_cost.py.

    python benchmarks/peers/flowpolicy_finetuning_worker.py '{"num_envs": 40, "chunks": 25, "width": 104}'

The same protocol as reinflow_worker.py: one JSON line with the sizes, then lines `rollout N` and `update N`, each
answered by the seconds it took. The rollout is what `collect_rollouts` does with the observations of all environments
(NumPy observations to tensors, chains, actions back to NumPy), the update is `ReinFlow.train()` without the KL stop,
so that all `epochs` are done; values, advantages and the critic's steps are in it, as they are in the peer's.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.models.config import TransformerConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig

OBSERVATION, ACTION = 11, 3  # Hopper's
DEFAULTS: dict[str, Any] = {
    "num_envs": 40, "chunks": 25, "width": 104, "depth": 2, "num_heads": 4, "objective": "flow_matching",
    "actions_per_token": 1, "num_steps": 4, "minibatch": 512, "epochs": 4, "threads": 1,
}  # fmt: skip


class Noise(gym.Env[Any, Any]):
    """Random observations and rewards, at no cost."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBSERVATION,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (ACTION,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        return self._observe(), float(self.np_random.normal()), False, False, {}

    def _observe(self) -> Any:
        return self.np_random.uniform(-1.0, 1.0, OBSERVATION).astype(np.float32)


def build(settings: dict[str, Any]) -> ReinFlow:
    model = TransformerConfig(
        width=settings["width"], depth=settings["depth"], num_heads=settings["num_heads"],
        actions_per_token=settings["actions_per_token"],
    )  # fmt: skip
    config = PolicyConfig(
        {"name": settings["objective"]}, model, {"observation": (OBSERVATION,)}, ACTION, 1, 4, 4
    )
    torch.manual_seed(0)
    return ReinFlow(
        FlowPolicy(config).eval(), DummyVecEnv([Noise] * settings["num_envs"]),
        num_steps=settings["num_steps"], n_steps=settings["chunks"], batch_size=settings["minibatch"],
        n_epochs=settings["epochs"], target_kl=None, critic_warmup=0, adaptive_rate=False, seed=0,
        device="cpu",
    )  # fmt: skip


class Work:
    """The model after one iteration, whose buffer every update learns from again."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.model = settings, build(settings)
        self.model.learn(1)
        self.observation = np.random.default_rng(0).uniform(-1, 1, (settings["num_envs"], 1, OBSERVATION))
        self.weights = {key: value.clone() for key, value in self.model.actor_critic.state_dict().items()}

    def rollout(self, calls: int) -> float:
        networks, policy = self.model.actor_critic, self.model.actor_critic.flow_policy
        started = time.perf_counter()
        for _ in range(calls):
            observation = policy.normalize_observations({"observation": self.observation.astype(np.float32)})
            noise = torch.randn(len(self.observation), 4, ACTION, generator=self.model.generator)
            chain = networks.flow.sample(observation, noise, self.model.generator)
            policy.action_normalizer.denormalize(chain.x[:, -1]).cpu().numpy()
        return time.perf_counter() - started

    def update(self, passes: int) -> float:
        seconds = 0.0
        for _ in range(passes):
            self.model.actor_critic.load_state_dict(self.weights)
            started = time.perf_counter()
            self.model.train()
            seconds += time.perf_counter() - started
        return seconds

    def about(self) -> dict[str, Any]:
        networks, settings = self.model.actor_critic, self.settings
        chunks = settings["num_envs"] * settings["chunks"]
        return {
            "parameters": networks.flow_policy.num_parameters(),
            "noise_parameters": count(networks.flow.noise),
            "critic_parameters": count(networks.critic),
            "actions_per_token": settings["actions_per_token"],
            "num_steps": settings["num_steps"],
            "num_envs": settings["num_envs"],
            "action_horizon": 4,
            "unique_chunks": chunks,
            "unique_transitions": chunks * settings["num_steps"],
            "environment_steps": chunks * 4,
            "epochs": settings["epochs"],
            "rows_per_epoch": chunks,
            "minibatch_rows": min(settings["minibatch"], chunks),
            "threads": settings["threads"],
        }


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def main() -> None:
    settings = {**DEFAULTS, **json.loads(sys.argv[1])}
    torch.set_num_threads(settings["threads"])
    work = Work(settings)
    print(json.dumps(work.about()), flush=True)
    modes = {"rollout": work.rollout, "update": work.update}
    for line in sys.stdin:
        mode, times = line.split()
        print(modes[mode](int(times)), flush=True)


if __name__ == "__main__":
    main()
