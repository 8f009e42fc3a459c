"""Observations for calibrating schedules and for timing samplers: of a policy's rollouts in its task, or
recorded ones where the task has no simulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowpolicy.data.sampling import ChunkSampler, as_tensors
from flowpolicy.data.store import read_demonstrations
from flowpolicy.errors import DataError, TaskError
from flowpolicy.evaluation.rollout import evaluate
from flowpolicy.evaluation.task import Task
from flowpolicy.policy import FlowPolicy
from flowpolicy.settings import require

CALIBRATION_SEED = 5_000_000
"""First environment seed of calibration episodes; all other uses have lower ones."""


class _Listening:
    """A policy that keeps the observations it is asked about."""

    def __init__(self, policy: FlowPolicy) -> None:
        self.policy, self.spec, self.device, self.nfe = policy, policy.spec, policy.device, policy.nfe
        self.heard: list[dict[str, Tensor]] = []

    def act(self, observations: Any, **settings: Any) -> Tensor:
        checked = self.policy.check_observations(observations)
        self.heard.append({key: value.cpu() for key, value in checked.items()})
        return self.policy.act(checked, **settings)


def observations_of(
    policy: FlowPolicy,
    task: Task,
    count: int,
    *,
    episodes: int = 16,
    seed: int = CALIBRATION_SEED,
    num_steps: int | None = None,
    demonstrations: str | None = None,
) -> dict[str, Tensor]:
    """``count`` observations, evenly spaced among those at which the policy samples a chunk in its task.

    A task without a simulator has none of these; then they are evenly spaced among the recorded ones, of
    ``episodes`` recorded episodes that ``seed`` chooses.

    Args:
        policy: that acts in the episodes.
        task: where.
        count: N.
        episodes: how many episodes they come from.
        seed: environment seed of the first one. Recorded episodes are drawn from one half of the recording or
            the other, so that with the seed of the next ``episodes`` others are drawn, as in a simulator.
        num_steps: K of the acting policy; its own default where None.
        demonstrations: the store of the recorded episodes.

    Returns:
        key -> ``(N, T_o, *shape)`` in physical units, float32 on the CPU.

    Raises:
        DataError: the episodes are too short for so many.
        TaskError: the environment cannot be made or does not fit, or there is none and no recording either.
    """
    require(count >= 1, "observations", count, "at least 1")
    if task.env_id is None:
        return recorded_observations(policy, task, count, episodes, seed, demonstrations)
    listening = _Listening(policy)
    evaluate(
        listening,
        task,
        episodes=episodes,
        seed=seed,
        num_envs=episodes,
        num_steps=num_steps,
    )
    together = {key: torch.cat([part[key] for part in listening.heard]) for key in listening.heard[0]}
    found = len(next(iter(together.values())))
    if found < count:
        raise DataError(
            f"{episodes} episodes gave {found} observations and {count} are wanted; take more episodes."
        )
    rows = torch.linspace(0, found - 1, count).round().long()
    return rows_of(together, rows)


def recorded_observations(
    policy: FlowPolicy, task: Task, count: int, episodes: int, seed: int, demonstrations: str | None
) -> dict[str, Tensor]:
    """Observations at the steps of recorded episodes; see :func:`observations_of`."""
    if demonstrations is None:
        raise TaskError(
            f"Task '{task.name}' has no simulator (env_id is null), so its observations come from its "
            "recording; name the task's file, which says where that is: env=PATH.yaml."
        )
    demos = read_demonstrations(demonstrations, policy.spec.features)
    order = np.random.default_rng(0).permutation(demos.num_episodes)
    half = order[seed // episodes % 2 :: 2]
    chosen = (half if len(half) else order)[:episodes]
    features = policy.spec.features
    windows = ChunkSampler(
        as_tensors(demos, features, "cpu"), as_tensors(demos, ["action"], "cpu")["action"],
        demos.episode_ends, policy.spec.obs_horizon, policy.spec.action_horizon, sorted(chosen.tolist()),
    )  # fmt: skip
    if len(windows) < count:
        raise DataError(
            f"{len(chosen)} recorded episodes have {len(windows)} steps and {count} observations are wanted; "
            "take more episodes, or fewer observations."
        )
    observations = windows.batch(torch.linspace(0, len(windows) - 1, count).round().long()).observation
    return {key: values.cpu() for key, values in policy.check_observations(observations).items()}


def making_and_judging(
    observe: Callable[..., dict[str, Tensor]], counts: tuple[int, int], episodes: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Observations to make something from, and others to judge it by: of other episodes, as neighbours in
    time are similar.

    Args:
        observe: :func:`observations_of` or :func:`recorded_observations` of a policy in a task.
        counts: of both.
        episodes: that each come from.
        seed: of the first episode.
    """
    making = observe(count=counts[0], episodes=episodes, seed=seed)
    return making, observe(count=counts[1], episodes=episodes, seed=seed + episodes)


def recording_of(env: Mapping[str, Any] | None) -> str | None:
    """The demonstrations that the settings of a task name."""
    return None if env is None else env.get("demonstrations")


def rows_of(observations: Mapping[str, Tensor], rows: Any) -> dict[str, Tensor]:
    """Some of the observations."""
    return {key: value[rows] for key, value in observations.items()}
