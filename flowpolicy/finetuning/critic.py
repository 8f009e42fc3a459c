"""The state-value function of an observation history."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from flowpolicy.policy.observation_features import ObservationFeatures

ValueFunction = Callable[[Mapping[str, Tensor]], Tensor]


class Critic(nn.Module):
    """V(o), an MLP with its own view of the observation; its unit is the scaled return.

    Args:
        features: what it takes from an observation.
        hidden: width of each hidden layer.
    """

    def __init__(self, features: ObservationFeatures, hidden: tuple[int, ...] = (256, 256)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.features = features
        size = features.size
        for width in hidden:
            layers += [nn.Linear(size, width), nn.LayerNorm(width), nn.SiLU()]
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, 1))
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Values ``(B,)`` of normalised observations; see :class:`ObservationFeatures` for images."""
        values: Tensor = self.layers(self.features(observation))
        return values.squeeze(-1)


@torch.no_grad()
def values_of(critic: ValueFunction, observation: Mapping[str, Tensor], rows: int = 2048) -> Tensor:
    """Values ``(N,)`` without gradient, a part at a time."""
    count = len(next(iter(observation.values())))
    parts = [
        critic({key: value[start : start + rows] for key, value in observation.items()})
        for start in range(0, count, rows)
    ]
    return torch.cat(parts)
