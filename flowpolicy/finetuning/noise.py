"""The learned noise that turns a deterministic flow into a Markov chain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from flowpolicy.policy.observation_features import ObservationFeatures
from flowpolicy.ranges import BelowOne, at_least, between, positive_to
from flowpolicy.settings import Settings, require

LARGEST_NOISE = 10.0


@dataclass(frozen=True)
class NoiseConfig(Settings, prefix="noise"):
    """Bounds and inputs of the injected noise, in normalised action units.

    Attributes:
        minimum: smallest standard deviation of a transition; on an uneven grid, of one of length 1/K.
        maximum: largest, at the start.
        final_maximum: largest, at the end of training.
        decay_from: share of training after which the largest falls linearly.
        hidden: width of the noise network.
        sees_chunk: give the network x_k besides the observation and the step.
    """

    minimum: Annotated[float, at_least(1e-6, "positive, at least 1e-6")] = 0.10
    maximum: Annotated[float, positive_to(LARGEST_NOISE)] = 0.24
    final_maximum: Annotated[float, positive_to(LARGEST_NOISE)] = 0.12
    decay_from: BelowOne = 0.35
    hidden: Annotated[int, between(1, 8192)] = 64
    sees_chunk: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("maximum", "final_maximum"):
            value = getattr(self, name)
            require(value >= self.minimum, f"noise.{name}", value, f"at least noise.minimum = {self.minimum}")

    def bounds(self, progress: float) -> tuple[float, float]:
        """Smallest and largest standard deviation when ``progress`` of training (0 to 1) is done."""
        done = (min(progress, 1.0) - self.decay_from) / (1.0 - self.decay_from)
        share = max(0.0, done)
        return self.minimum, self.maximum + share * (self.final_maximum - self.maximum)


class NoiseNetwork(nn.Module):
    """Standard deviations sigma(o, k[, x_k]) within bounds, for every transition of a chain at once.

    log sigma moves between the logarithms of the bounds as tanh moves between -1 and 1. The last layer
    starts at zero: every standard deviation starts at the geometric mean of the bounds.

    Args:
        features: what it takes from an observation.
        num_steps: K.
        action_horizon: T.
        action_dim: A.
        config: bounds and inputs.
    """

    log_bounds: Tensor

    def __init__(
        self,
        features: ObservationFeatures,
        num_steps: int,
        action_horizon: int,
        action_dim: int,
        config: NoiseConfig,
    ) -> None:
        super().__init__()
        self.chunk_shape = (action_horizon, action_dim)
        size, hidden = action_horizon * action_dim, config.hidden
        self.features = features
        self.observation = nn.Linear(features.size, hidden)
        self.step = nn.Embedding(num_steps, hidden)
        self.chunk = nn.Linear(size, hidden) if config.sees_chunk else None
        self.output = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, size))
        last = self.output[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.register_buffer("log_bounds", torch.zeros(2))
        self.set_bounds(*config.bounds(0.0))

    def set_bounds(self, minimum: float, maximum: float) -> None:
        """Change the bounds; only between iterations, never while chains wait to be scored."""
        self.log_bounds.copy_(torch.tensor([math.log(minimum), math.log(maximum)]))

    def forward(self, observation: Mapping[str, Tensor], x: Tensor, steps: Tensor) -> Tensor:
        """Standard deviations ``(B, S, T, A)`` of the transitions from ``x`` at the given steps.

        Args:
            observation: normalised, key -> ``(B, T_o, *shape)``, images as tokens.
            x: ``(B, S, T, A)``; used only with ``sees_chunk``.
            steps: ``(S,)`` int64, which of the K steps.
        """
        hidden = self.observation(self.features(observation))[:, None] + self.step(steps)
        if self.chunk is not None:
            hidden = hidden + self.chunk(x.flatten(2))
        share = (torch.tanh(self.output(hidden)) + 1) / 2
        low, high = self.log_bounds.unbind()
        std = torch.exp(low + share * (high - low))
        return std.view(*std.shape[:2], *self.chunk_shape)
