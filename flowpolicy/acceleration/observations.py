"""Observations from a policy's rollouts in its task, for calibrating schedules and for timing samplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowpolicy.errors import DataError
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
) -> dict[str, Tensor]:
    """``count`` observations, evenly spaced among those at which the policy samples a chunk in its task.

    Args:
        policy: that acts in the episodes.
        task: where.
        count: N.
        episodes: how many episodes they come from.
        seed: environment seed of the first one.
        num_steps: K of the acting policy; its own default where None.

    Returns:
        key -> ``(N, T_o, *shape)`` in physical units, float32 on the CPU.

    Raises:
        DataError: the episodes are too short for so many.
        TaskError: the environment cannot be made or does not fit.
    """
    require(count >= 1, "observations", count, "at least 1")
    listening = _Listening(policy)
    evaluate(
        listening,
        task,
        episodes=episodes,
        seed=seed,
        num_envs=episodes,
        num_steps=num_steps,
        show_progress=False,
    )
    together = {key: torch.cat([part[key] for part in listening.heard]) for key in listening.heard[0]}
    found = len(next(iter(together.values())))
    if found < count:
        raise DataError(
            f"{episodes} episodes gave {found} observations and {count} are wanted; take more episodes."
        )
    rows = torch.linspace(0, found - 1, count).round().long()
    return rows_of(together, rows)


def rows_of(observations: Mapping[str, Tensor], rows: Any) -> dict[str, Tensor]:
    """Some of the observations."""
    return {key: value[rows] for key, value in observations.items()}
