"""Observation encoders: one step of observations to tokens that the action tokens attend to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
from flowpolicy.models.config import ModelConfig


class StateEncoder(nn.Module):
    """Low-dimensional keys, concatenated, to ``tokens_per_step`` tokens for each of the T_o steps.

    Args:
        shapes: key -> ``(size,)``; the order of the keys is the order of concatenation.
        obs_horizon: T_o.
        config: gives width and tokens per step.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], obs_horizon: int, config: ModelConfig) -> None:
        super().__init__()
        for key, shape in shapes.items():
            if len(shape) != 1:
                raise ConfigError(f"Observation '{key}' has shape {shape}; the state encoder takes vectors.")
        self.keys = tuple(shapes)
        self.tokens_per_step = config.tokens_per_step
        size, width = sum(shape[0] for shape in shapes.values()), config.width
        self.mlp = nn.Sequential(
            nn.Linear(size, 2 * width), nn.SiLU(), nn.Linear(2 * width, config.tokens_per_step * width)
        )
        self.position = nn.Parameter(0.02 * torch.randn(obs_horizon * config.tokens_per_step, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Tokens ``(B, T_o * tokens_per_step, d)``."""
        state = torch.cat([observation[key] for key in self.keys], dim=-1)
        tokens = self.mlp(state).view(len(state), -1, self.position.shape[-1])
        result: Tensor = self.norm(tokens) + self.position
        return result
