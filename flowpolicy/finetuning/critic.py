"""The state-value function of an observation history."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowpolicy.finetuning.noise import flatten_observation


class Critic(nn.Module):
    """V(o), an MLP with its own view of the observation; its unit is the scaled return.

    Args:
        observation_size: numbers in one flattened observation history.
        hidden: width of each hidden layer.
    """

    def __init__(self, observation_size: int, hidden: tuple[int, ...] = (256, 256)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = observation_size
        for width in hidden:
            layers += [nn.Linear(size, width), nn.LayerNorm(width), nn.SiLU()]
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, 1))
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Values ``(B,)`` of normalised observations, key -> ``(B, T_o, *shape)``."""
        values: Tensor = self.layers(flatten_observation(observation))
        return values.squeeze(-1)


@torch.no_grad()
def values_of(critic: Critic, observation: Mapping[str, Tensor], rows: int = 8192) -> Tensor:
    """Values ``(N,)`` without gradient, a part at a time."""
    count = len(next(iter(observation.values())))
    parts = [
        critic({key: value[start : start + rows] for key, value in observation.items()})
        for start in range(0, count, rows)
    ]
    return torch.cat(parts)
