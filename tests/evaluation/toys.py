"""A policy and an environment small enough to predict by hand; importable by worker processes."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch

from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.task import Task
from flowpolicy.features import features_of
from flowpolicy.spec import PolicySpec


class ToyEnv(gymnasium.Env):
    """Adds the action to its state; an episode's length and start follow from its seed.

    The reward is the first action entry, so a return is the sum of what the policy did. With ``several``
    tasks, it plays "even" and "odd" seeds as tasks of those names.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - gymnasium's convention

    def __init__(
        self, render_mode: str | None = None, dict_observation: bool = False, several: bool = False
    ) -> None:
        self.render_mode = render_mode
        self.several = several
        self.dict_observation = dict_observation
        box = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.observation_space = gymnasium.spaces.Dict({"pose": box}) if dict_observation else box
        self.action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.task = "odd" if seed is not None and seed % 2 else "even"
        self.state = self.np_random.normal(size=3)
        self.length = int(self.np_random.integers(3, 15))
        self.steps = 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.state[:2] += action
        self.steps += 1
        over = self.steps >= self.length
        info = {"success": self.steps == 2 and self.length % 2 == 0, "score": float(-self.steps)}
        if self.several:
            info["task"] = self.task
        return (
            self._observation(),
            float(action[0]),
            over and self.length > 6,
            over and self.length <= 6,
            info,
        )

    def render(self) -> Any:
        return np.full((51, 33, 3), 10 * self.steps, dtype=np.uint8)

    def _observation(self) -> Any:
        return {"pose": self.state.copy()} if self.dict_observation else self.state.copy()


class ToyPolicy:
    """Action k of a chunk is mean(history)[:2] / 10 + noise + k / 100, row by row."""

    device = torch.device("cpu")

    def __init__(self, key: str = "observation", fault: float | None = None) -> None:
        self.key = key
        self.fault = fault
        self.spec = PolicySpec(features_of({key: (3,)}), 2, 4, 4, action_dim=2, name="toy")
        self.batches: list[int] = []
        self.noises: list[torch.Tensor] = []
        self.seen: list[np.ndarray] = []

    def nfe(self, num_steps: int | None = None, solver: str | None = None) -> int:
        return num_steps or 4

    def act(
        self,
        observations: Any,
        *,
        num_steps: int | None = None,
        solver: str | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if num_steps == 3:
            raise ConfigError("num_steps is 3; it must be a power of two.")
        history = torch.as_tensor(observations[self.key])
        assert history.dtype == torch.float32
        assert noise is not None
        self.batches.append(len(history))
        self.noises.append(noise.clone())
        self.seen.append(history.numpy().copy())
        ramp = torch.arange(4).reshape(1, 4, 1) / 100
        chunk = (history[:, 0, :2] + history[:, 1, :2])[:, None] / 20 + noise + ramp
        return chunk if self.fault is None else torch.full_like(chunk, self.fault)


def load_toy(path: str) -> ToyPolicy:
    """Stands for loading a checkpoint in a worker."""
    return ToyPolicy()


def toy_task(**changes: Any) -> Task:
    settings: dict[str, Any] = {
        "name": "toy",
        "env_id": f"{__name__}:ToyEnv-v0",
        "obs_horizon": 2,
        "action_horizon": 4,
        "execute_horizon": 3,
        "control_hz": 10.0,
    }
    return Task(**{**settings, **changes})


if "ToyEnv-v0" not in gymnasium.registry:
    gymnasium.register("ToyEnv-v0", entry_point=ToyEnv, disable_env_checker=True, order_enforce=False)
