"""The Fetch arm (Plappert et al. 2018) from gymnasium-robotics: one vector observed, an end with success."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from flowpolicy.settings import require


class FetchTask(gym.Wrapper[np.ndarray, np.ndarray, Any, np.ndarray]):
    """A Fetch environment whose observation is one float32 vector and whose episode ends with success.

    The vector is the wrapped ``observation``, the object's pose and motion relative to the gripper among it,
    followed by ``desired_goal`` ``(3,)``. The reward is 1 at success and 0 elsewhere.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        spaces: Any = env.observation_space
        size = spaces["observation"].shape[0] + spaces["desired_goal"].shape[0]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; object and goal lie where the seed says."""
        observation, info = self.env.reset(seed=seed, options=options)
        return _flat(observation), {**info, "success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the gripper by ``action[:3]`` times 5 cm, and open (1) or close (-1) it by ``action[3]``."""
        observation, _, _, truncated, info = self.env.step(np.asarray(action, dtype=np.float32))
        success = bool(info["is_success"])
        return _flat(observation), float(success), success, bool(truncated), {**info, "success": success}


def _flat(observation: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([observation["observation"], observation["desired_goal"]]).astype(np.float32)


def make_fetch(wrapped_id: str, render_mode: str | None = None, **kwargs: Any) -> FetchTask:
    """Entry point of ``flowpolicy/Fetch*-v0``; further keyword arguments go to gymnasium-robotics."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    # The time limit belongs to the outer registration; this one must never fire before it.
    env = gym.make(
        wrapped_id, render_mode=render_mode, max_episode_steps=-1, disable_env_checker=True, **kwargs
    )
    return FetchTask(env)


class PickAndPlaceExpert:
    """Grasps the object from above and carries it to the goal, lifting it first or straight on.

    Args:
        slowest: the speed of an episode is drawn from [slowest, 1] of the fastest.
        lift: how high the way ``lift`` carries the object before it turns to the goal, in m.
    """

    GAIN = 10.0  # of the position controller; a command of 1 is 5 cm
    HOVER = 0.06  # above the object before the descent, in m
    ALIGNED = 0.015
    GRASPED = 0.02

    def __init__(self, slowest: float = 0.6, lift: float = 0.15) -> None:
        require(0 < slowest <= 1, "scripted.settings.slowest", slowest, "in (0, 1]")
        require(lift > 0, "scripted.settings.lift", lift, "above 0")
        self.slowest, self.lift = slowest, lift

    def reset(self, env: gym.Env[Any, Any], rng: np.random.Generator) -> str:
        """Choose the speed and the way."""
        self._speed = float(rng.uniform(self.slowest, 1.0))
        self._way = str(rng.choice(["straight", "lift"]))
        self._closed = 0
        self._lifted = self._way == "straight"
        self._table: float | None = None
        return self._way

    def act(self, env: gym.Env[Any, Any], observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The next action ``(4,)``."""
        vector = observation["observation"]
        gripper, thing, goal = vector[:3], vector[3:6], vector[-3:]
        self._table = float(thing[2]) if self._table is None else self._table
        offset = thing - gripper
        beside = float(np.linalg.norm(offset[:2]))
        if self._closed == 0 and (beside > self.ALIGNED or abs(offset[2]) > self.GRASPED):
            height = self.HOVER if beside > self.ALIGNED else 0.0
            return self._towards(offset + np.array([0.0, 0.0, height]), 1.0)
        if beside > 0.05 or abs(offset[2]) > 0.05:  # the object was lost: begin again
            self._closed = 0
        self._closed += 1
        if self._closed <= 3:  # the fingers need a moment
            return np.array([0.0, 0.0, 0.0, -1.0])
        if not self._lifted:
            self._lifted = thing[2] - self._table > self.lift
            return self._towards(np.array([0.0, 0.0, 0.1]), -1.0)
        return self._towards(goal - thing, -1.0)

    def _towards(self, offset: np.ndarray, gripper: float) -> np.ndarray:
        move = np.clip(self.GAIN * offset, -1.0, 1.0) * self._speed
        return np.array([*move, gripper])
