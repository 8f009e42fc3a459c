"""A residual MLP over the whole chunk: a network without addressable blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpolicy.models.config import MLPConfig
from flowpolicy.models.encoders import build_encoder
from flowpolicy.models.network import NETWORKS, VelocityNetwork
from flowpolicy.models.step_size import StepSizeEmbedding
from flowpolicy.plugins import register
from flowpolicy.spec import PolicySpec


@register(NETWORKS)
class VelocityMLP(VelocityNetwork):
    """v from the flattened chunk, the mean of the observation tokens, t and d.

    Args:
        config: sizes.
        spec: its observations and actions.
        levels: step sizes that it tells apart, 1 where only d = 0 is asked for.
    """

    name: ClassVar[str] = "mlp"
    Config = MLPConfig
    frequencies: Tensor

    def __init__(self, config: MLPConfig, spec: PolicySpec, levels: int = 1) -> None:
        super().__init__(config, spec, levels)
        self.config, hidden = config, config.hidden
        self.encoder = build_encoder(spec.features, spec.obs_horizon, config)
        self.embed_observation = nn.Linear(config.width, hidden)
        self.embed_chunk = nn.Linear(math.prod(spec.chunk_shape), hidden)
        self.embed_time = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.embed_step_size = StepSizeEmbedding(levels, hidden)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
            )
            for _ in range(config.depth)
        )
        self.output = nn.Linear(hidden, math.prod(spec.chunk_shape))
        nn.init.zeros_(self.output.weight)  # it starts as the zero velocity
        self.register_buffer("frequencies", torch.linspace(0.0, math.log(100.0), 32).exp_(), persistent=False)

    def encode_images(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observation with images replaced by their tokens ``(B, num_tokens, d)``; the rest stays."""
        return self.encoder.encode_images(observation)

    def encode(self, observation: Mapping[str, Tensor]) -> Tensor:
        """``(B, hidden)``."""
        context: Tensor = self.embed_observation(self.encoder(observation).mean(1))
        return context

    def velocity(self, x: Tensor, t: Tensor, d: Tensor, context: Tensor) -> Tensor:
        """v ``(B, T, A)``."""
        angles = t[:, None] * self.frequencies
        time = self.embed_time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.embed_step_size(d)
        h = self.embed_chunk(x.flatten(1)) + context + time
        for layer in self.layers:
            h = h + layer(h)
        v: Tensor = self.output(F.silu(h))
        return v.view_as(x)
