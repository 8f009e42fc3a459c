"""Whole episodes of an expert, many side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from flowpolicy.data.store import Demonstrations
from flowpolicy.data.task_texts import with_task_table
from flowpolicy.evaluation.environment import standard
from flowpolicy.evaluation.task import make_environment
from flowpolicy_envs.actor import ExpertActor


@dataclass
class Episode:
    """One whole episode.

    Attributes:
        observation: key -> ``(steps, *shape)``, the observation before each action: float32, or uint8 of an
            image. An environment without keys has the one key ``observation``.
        action: ``(steps, A)`` float32, as the environment received it.
        reward: ``(steps,)`` float32.
        terminated: ends in a terminal state; otherwise the time limit ended it.
        total: undiscounted return, summed in double precision.
        success: whether the environment called it one at any step; None where it never says.
        task: the task's name from the environment, if it has several tasks; empty otherwise.
    """

    observation: dict[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    terminated: bool
    total: float
    success: bool | None
    task: str = ""

    def __len__(self) -> int:
        return len(self.action)


@dataclass
class EpisodeRecorder:
    """Collects the steps of an episode."""

    observation: dict[str, list[np.ndarray]] = field(default_factory=dict)
    action: list[np.ndarray] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    success: bool | None = None
    task: str = ""

    def observe(self, observation: Mapping[str, np.ndarray]) -> None:
        """Add the observation before an action; copied, since a simulator may reuse its arrays."""
        for key, value in observation.items():
            self.observation.setdefault(key, []).append(np.array(value))

    def act(self, action: np.ndarray, reward: float, info: Mapping[str, Any]) -> None:
        """Add the action at that observation, and its outcome."""
        self.action.append(action)
        self.reward.append(float(reward))
        if "success" in info:
            self.success = bool(self.success) or bool(info["success"])
        self.task = str(info.get("task", ""))

    def finish(self, terminated: bool) -> Episode:
        """The whole episode."""
        return Episode(
            {key: np.stack(rows) for key, rows in self.observation.items()},
            np.stack(self.action).astype(np.float32),
            np.array(self.reward, dtype=np.float32),
            terminated,
            float(np.sum(self.reward)),
            self.success,
            self.task,
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
    return play(
        lambda batch, _: actor.act(batch["observation"], rng, deterministic=deterministic),
        ("observation",),
        [standard(env) for env in envs],
        seeds,
    )


def play(
    act: Callable[[Mapping[str, np.ndarray], list[int]], np.ndarray],
    keys: Sequence[str],
    envs: Sequence[Any],
    seeds: Sequence[int],
) -> list[Episode]:
    """Play one episode in each standard environment, side by side, each to its own end.

    Args:
        act: actions ``(n, A)``, within bounds, of the observations of ``n`` environments, key ->
            ``(n, *shape)``, and which they are.
        keys: of the observations that it is given; all are recorded.
        envs: the environments.
        seeds: that each is reset with.
    """
    observations = [env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)]
    recorders = [EpisodeRecorder() for _ in envs]
    episodes: dict[int, Episode] = {}
    alive = list(range(len(envs)))
    while alive:
        batch = {key: np.stack([observations[i][key] for i in alive]) for key in keys}
        for action, i in zip(act(batch, alive), alive, strict=True):
            recorders[i].observe(observations[i])
            observations[i], reward, terminated, truncated, info = envs[i].step(action)
            recorders[i].act(action, float(reward), info)
            if terminated or truncated:
                episodes[i] = recorders[i].finish(bool(terminated))
        alive = [i for i in alive if i not in episodes]
    return [episodes[i] for i in range(len(envs))]


def join(episodes: Sequence[Episode], attributes: Mapping[str, Any]) -> Demonstrations:
    """Lay episodes end to end; ``attributes`` says where they come from, ``env_id`` among it."""
    ends = np.cumsum([len(episode) for episode in episodes])
    terminal = np.array([episode.terminated for episode in episodes])
    terminated, truncated = np.zeros(ends[-1], dtype=bool), np.zeros(ends[-1], dtype=bool)
    terminated[ends - 1], truncated[ends - 1] = terminal, ~terminal
    arrays = {
        key: np.concatenate([episode.observation[key] for episode in episodes])
        for key in episodes[0].observation
    }
    arrays |= {
        "action": np.concatenate([episode.action for episode in episodes]),
        "reward": np.concatenate([episode.reward for episode in episodes]),
        "terminated": terminated,
        "truncated": truncated,
    }
    arrays, about = with_task_table(arrays, attributes)
    return Demonstrations(arrays, ends, about, source=f"episodes of {attributes['env_id']}")


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
    envs = [make_environment(env_id, env_kwargs or {}, "A rollout") for _ in range(episodes)]
    try:
        seeds = [seed + index for index in range(episodes)]
        played = run_episodes(actor, envs, seeds, np.random.default_rng(seed), deterministic=deterministic)
    finally:
        for env in envs:
            env.close()
    return np.array([episode.total for episode in played])
