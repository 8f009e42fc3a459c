"""Whole episodes of a demonstrator, many side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from flowpolicy_envs.actor import ExpertActor


@dataclass
class Episode:
    """One whole episode.

    Attributes:
        observation: ``(steps, O)`` float32, what the actor saw before each action.
        action: ``(steps, A)`` float32, as the environment received it.
        reward: ``(steps,)`` float32.
        terminated: ends in a terminal state; otherwise the time limit ended it.
        total: undiscounted return, summed in double precision.
        success: whether the environment called it one at any step; None where it never says.
    """

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: bool
    total: float
    success: bool | None

    def __len__(self) -> int:
        return len(self.action)


@dataclass
class _Recorder:
    observation: list[np.ndarray] = field(default_factory=list)
    action: list[np.ndarray] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    success: bool | None = None

    def finish(self, terminated: bool) -> Episode:
        return Episode(
            np.stack(self.observation).astype(np.float32),
            np.stack(self.action).astype(np.float32),
            np.array(self.reward, dtype=np.float32),
            terminated,
            float(np.sum(self.reward)),
            self.success,
        )


def run_episodes(
    actor: ExpertActor,
    envs: Sequence[gym.Env[Any, Any]],
    seeds: Sequence[int],
    rng: np.random.Generator,
    *,
    deterministic: bool = False,
) -> list[Episode]:
    """Play one episode in each environment, side by side, each to its own end.

    Episode ``i`` starts from ``envs[i].reset(seed=seeds[i])``; the actor's noise comes from ``rng``.
    """
    observations = [env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)]
    recorders = [_Recorder() for _ in envs]
    episodes: dict[int, Episode] = {}
    alive = list(range(len(envs)))
    while alive:
        batch = np.stack([observations[i] for i in alive])
        for action, i in zip(actor.act(batch, rng, deterministic=deterministic), alive, strict=True):
            recorder = recorders[i]
            recorder.observation.append(np.asarray(observations[i]))
            recorder.action.append(action)
            observations[i], reward, terminated, truncated, info = envs[i].step(action)
            recorder.reward.append(float(reward))
            if "success" in info:
                recorder.success = bool(recorder.success) or bool(info["success"])
            if terminated or truncated:
                episodes[i] = recorder.finish(bool(terminated))
        alive = [i for i in alive if i not in episodes]
    return [episodes[i] for i in range(len(envs))]


def episode_returns(
    actor: ExpertActor,
    env_id: str,
    episodes: int,
    seed: int,
    *,
    deterministic: bool = False,
    env_kwargs: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Undiscounted returns ``(episodes,)`` of an actor, episodes run side by side from seeds ``seed + i``."""
    envs = [gym.make(env_id, **(env_kwargs or {})) for _ in range(episodes)]
    try:
        seeds = [seed + index for index in range(episodes)]
        played = run_episodes(actor, envs, seeds, np.random.default_rng(seed), deterministic=deterministic)
    finally:
        for env in envs:
            env.close()
    return np.array([episode.total for episode in played])
