"""Environments that do not run in step: the first episode of each is cut short at another length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym

from flowpolicy.errors import ConfigError

if TYPE_CHECKING:  # which brings torch, and environments do without
    from flowpolicy.evaluation.task import Task


class CutFirstEpisode(gym.Wrapper[Any, Any, Any, Any]):  # type: ignore[misc]
    """Truncates the first episode after ``length`` steps; later ones are left alone.

    Where no episode ends before its time limit, all environments would otherwise be at the same moment of it
    for ever, and an iteration would see only that part of the task.

    Attributes:
        left: steps until the cut; None after the first episode.
    """

    def __init__(self, env: Any, length: int) -> None:
        super().__init__(env)
        self.left: int | None = length

    def step(self, action: Any) -> Any:
        """See Gymnasium; a cut is a truncation, not an end."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.left is not None:
            self.left -= 1
            if self.left <= 0 or terminated or truncated:
                truncated = truncated or not terminated
                self.left = None
        return observation, reward, terminated, truncated, info


def make_staggered(task: Task, number: int, count: int) -> Any:
    """Environment ``number`` of ``count``, whose first episode has (number + 1) / count of the task's length.

    Raises:
        ConfigError: the environment has no time limit.
    """
    env = task.make()
    limit = env.spec.max_episode_steps if env.spec else None
    if limit is None:
        env.close()
        raise ConfigError(
            f"Task '{task.name}' has no time limit, so stagger=true has nothing to spread; leave it out."
        )
    return CutFirstEpisode(env, max(1, limit * (number + 1) // count))
