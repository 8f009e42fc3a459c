"""The observations and actions of a policy: the one description against which environments, robots, stores
and servers are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import TaskError
from flowpolicy.features import Feature
from flowpolicy.features.presence import offered


@dataclass(frozen=True)
class PolicySpec:
    """The outside of a policy; its sampler, a server's client and the policy itself have the same.

    Attributes:
        features: observation key -> kind and shape of one step.
        obs_horizon: observation steps given to the policy, T_o.
        action_horizon: chunk length, T.
        execute_horizon: actions executed per chunk, T_e.
        action_dim: A.
        name: of its objective.
        task: settings of the task it was trained for; empty where unknown.
        metadata: where it comes from.
        noise_dim: numbers of x_0 for each action; None: A.
        rotations: dimensions of an action that are rotations, kind -> the first of each.
    """

    features: Mapping[str, Feature]
    obs_horizon: int
    action_horizon: int
    execute_horizon: int
    action_dim: int
    name: str = "policy"
    task: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    noise_dim: int | None = None
    rotations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def observation_shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of one observation step."""
        return {key: feature.shape for key, feature in self.features.items()}

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """(T, A)."""
        return self.action_horizon, self.action_dim

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Of the x_0 of a chunk."""
        return self.action_horizon, self.action_dim if self.noise_dim is None else self.noise_dim

    def resting_observation(self) -> dict[str, NDArray[Any]]:
        """Values that the policy takes, zeros where its kinds have them, key -> ``(T_o, *shape)``."""
        return {key: np.stack([each.resting()] * self.obs_horizon) for key, each in self.features.items()}

    def check(
        self,
        name: str,
        observations: Mapping[str, Feature | tuple[int, ...]],
        action_shape: tuple[int, ...] | None,
    ) -> None:
        """Refuse an environment, a robot or anything else that the policy does not fit.

        Args:
            name: what the message calls it.
            observations: key -> feature that it offers, or shape of one step where it declares no kind.
            action_shape: of the actions that it takes; None where they are no vector of numbers.

        Raises:
            TaskError: names what differs and the fix.
        """
        if action_shape != (self.action_dim,):
            takes = "that are no vectors" if action_shape is None else f"of shape {action_shape}"
            raise TaskError(
                f"{name} takes actions {takes} and the policy gives vectors of "
                f"{self.action_dim}; choose the task and robot that the policy was trained for."
            )
        for key, feature in offered(self.features, observations).items():
            if key not in observations:
                raise TaskError(
                    f"{name} has no observation '{key}' that the policy needs (it has "
                    f"{', '.join(sorted(observations)) or 'none'}); choose the task and robot that the "
                    "policy was trained for, or map its observation."
                )
            given = observations[key]
            shape = given.shape if isinstance(given, Feature) else tuple(given)
            told = given.declaration() if isinstance(given, Feature) else feature.declaration()
            if (told, shape) != (feature.declaration(), feature.shape):
                is_kind = told != feature.declaration()
                has, takes = (f" ({told})", f" ({feature.declaration()})") if is_kind else ("", "")
                raise TaskError(
                    f"{name} gives '{key}' of shape {shape}{has} and the policy takes "
                    f"{feature.shape}{takes}; choose the task and robot that the policy was trained for, or "
                    "map its observation."
                )
