"""The Adroit hand (Rajeswaran et al. 2018) from gymnasium-robotics, float32, with a plain success flag."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class AdroitTask(gym.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """An Adroit environment whose ``info["success"]`` is a bool and whose observation is float32.

    Actions ``(A,)`` are clipped to [-1, 1]. An episode can be started where a demonstration was:
    ``reset(options={"initial_state_dict": demonstration["init_state_dict"]})``.

    Args:
        env: of gymnasium-robotics.
        ends_at_success: whether the first success is a terminal state. With ``reward_type=sparse`` the return
            then says whether and how soon.
    """

    def __init__(self, env: gym.Env[Any, Any], *, ends_at_success: bool = False) -> None:
        super().__init__(env)
        self.ends_at_success = env.unwrapped.ends_at_success = ends_at_success  # type: ignore[attr-defined]
        shape = env.observation_space.shape
        assert shape is not None
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation.astype(np.float32), {**info, "success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply joint targets ``(A,)``, scaled to [-1, 1], for 10 ms."""
        clipped = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        observation, reward, terminated, truncated, info = self.env.step(clipped)
        success = bool(np.all(info["success"]))
        return (
            observation.astype(np.float32),
            float(np.asarray(reward).item()),
            bool(terminated) or (self.ends_at_success and success),
            bool(truncated),
            {**info, "success": success},
        )


def make_adroit(
    wrapped_id: str, render_mode: str | None = None, ends_at_success: bool = False, **kwargs: Any
) -> AdroitTask:
    """Entry point of ``flowpolicy/Adroit*-v1``; further keyword arguments go to gymnasium-robotics."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    # The time limit belongs to the outer registration; this one must never fire before it.
    env = gym.make(
        wrapped_id, render_mode=render_mode, max_episode_steps=-1, disable_env_checker=True, **kwargs
    )
    return AdroitTask(env, ends_at_success=ends_at_success)
