"""The encoder from numbers to tokens, for vectors and every kind that is read as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn


class Numbers(Protocol):
    """A feature that is read as numbers."""

    @property
    def size(self) -> int:
        """Numbers of one step."""

    def numbers(self, values: Tensor) -> Tensor:
        """``(B, T_o, size)`` of ``(B, T_o, *shape)``."""


class StateEncoder(nn.Module):
    """The numbers of all keys, concatenated, to ``tokens_per_step`` tokens for each of the T_o steps.

    Args:
        features: by key; their order is the order of concatenation.
        obs_horizon: T_o.
        width: channels of a token, d.
        tokens_per_step: tokens made from one observation step.
    """

    def __init__(
        self, features: Mapping[str, Numbers], obs_horizon: int, width: int, tokens_per_step: int
    ) -> None:
        super().__init__()
        self.features = dict(features)
        self.tokens_per_step = tokens_per_step
        size = sum(feature.size for feature in features.values())
        self.mlp = nn.Sequential(
            nn.Linear(size, 2 * width), nn.SiLU(), nn.Linear(2 * width, tokens_per_step * width)
        )
        self.position = nn.Parameter(torch.randn(obs_horizon * tokens_per_step, width).mul_(0.02))
        self.norm = nn.LayerNorm(width)

    def encode_images(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observation as it is: there are no images."""
        return dict(observation)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Tokens ``(B, T_o * tokens_per_step, d)``."""
        parts = [feature.numbers(observation[key]) for key, feature in self.features.items()]
        tokens = self.mlp(torch.cat(parts, dim=-1)).view(len(parts[0]), -1, self.position.shape[-1])
        result: Tensor = self.norm(tokens) + self.position
        return result
