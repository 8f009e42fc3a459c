"""FrankaKitchen (Gupta et al. 2019) from gymnasium-robotics, observed as recordings are, scored by tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from flowpolicy.errors import DataError
from flowpolicy.settings import require

TASKS = (
    "bottom burner",
    "top burner",
    "light switch",
    "slide cabinet",
    "hinge cabinet",
    "microwave",
    "kettle",
)
ROBOT, OBJECTS = 9, 21  # joint positions of arm and fingers, and of everything that moves in the kitchen
MINARI_SIZE, D4RL_SIZE = 59, 60


def positions_from_recorded(observation: np.ndarray) -> np.ndarray:
    """Joint positions ``(steps, 30)`` from observations of either recording.

    gymnasium-robotics and Minari observe 59 numbers: robot positions (9) and velocities (9), object positions
    (21) and velocities (20). D4RL's files hold 60: robot and object positions (30) and the goal's (30).
    Both contain the positions, which are the observations of policies here.

    Raises:
        DataError: rows of another size.
    """
    size = observation.shape[-1] if observation.ndim == 2 else None
    if size == MINARI_SIZE:
        parts = observation[:, :ROBOT], observation[:, 2 * ROBOT : 2 * ROBOT + OBJECTS]
        return np.concatenate(parts, axis=1).astype(np.float32)
    if size == D4RL_SIZE:
        return observation[:, : ROBOT + OBJECTS].astype(np.float32)
    raise DataError(
        f"Kitchen observations have shape {observation.shape}; rows of {MINARI_SIZE} (Minari, "
        f"gymnasium-robotics) or {D4RL_SIZE} (D4RL) numbers are known."
    )


def keep_positions(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The ``demo_transform`` of the kitchen: positions as the observation, and goals left out."""
    kept = {key: array for key, array in arrays.items() if "." not in key}
    return {**kept, "observation": positions_from_recorded(arrays["observation"])}


class KitchenTask(gym.Wrapper[np.ndarray, np.ndarray, Any, np.ndarray]):
    """A kitchen whose observation is the positions ``(30,)`` and whose ``info`` says how much is done.

    ``info["score"]`` is the number of tasks completed so far in the episode, ``info["success"]`` whether all
    are; then the episode ends. The reward is 1 for each task in the step that completes it. Actions ``(9,)``
    are joint velocities, scaled to [-1, 1].
    """

    def __init__(self, env: gym.Env[Any, Any], tasks: Sequence[str]) -> None:
        super().__init__(env)
        self.wanted = tuple(tasks)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (ROBOT + OBJECTS,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (ROBOT,), np.float32)

    @property
    def dt(self) -> float:
        """Seconds of a step."""
        return float(self.env.unwrapped.robot_env.dt)  # type: ignore[attr-defined]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode in a kitchen where nothing is done yet."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._observed(observation), {**info, "success": False, "score": 0.0}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply joint velocities ``(9,)`` for 80 ms."""
        observation, reward, terminated, truncated, info = self.env.step(np.asarray(action, dtype=np.float64))
        done = list(info["episode_task_completions"])  # the simulator's own list, which it empties at a reset
        info = {**info, "episode_task_completions": done, "score": float(len(done))}
        info["success"] = len(done) == len(self.wanted)
        return self._observed(observation), float(reward), bool(terminated), bool(truncated), info

    def _observed(self, observation: dict[str, Any]) -> np.ndarray:
        return positions_from_recorded(observation["observation"][None])[0]


def make_kitchen(tasks: Sequence[str] = TASKS, render_mode: str | None = None, **kwargs: Any) -> KitchenTask:
    """Entry point of ``flowpolicy/FrankaKitchen-v0``; further keyword arguments go to gymnasium-robotics.

    Args:
        tasks: which of ``TASKS`` are to be done, in any order.
        render_mode: None or ``rgb_array``.

    Raises:
        ConfigError: a task that the kitchen has not, or none.
    """
    import gymnasium_robotics

    known = len(tasks) > 0 and set(tasks) <= set(TASKS) and len(set(tasks)) == len(tasks)
    require(known, "env.env_kwargs.tasks", list(tasks), f"some of {', '.join(TASKS)}, each once")
    gym.register_envs(gymnasium_robotics)
    env = gym.make(
        "FrankaKitchen-v1",
        render_mode=render_mode,
        tasks_to_complete=list(tasks),
        max_episode_steps=-1,
        disable_env_checker=True,
        **kwargs,
    )
    return KitchenTask(env, tasks)
