"""The velocity network: a transformer over action tokens that attends to observation tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpolicy.models.blocks import (
    Branch,
    CrossAttention,
    FeedForward,
    KeyValue,
    SelfAttention,
    modulate,
    spread,
)
from flowpolicy.models.config import ModelConfig
from flowpolicy.models.encoders import ObservationEncoder, build_encoder

Context = list[KeyValue]  # one entry a layer


class Block(NamedTuple):
    """The address of a residual branch: its layer, its kind (SA, CA or FFN) and the module."""

    layer: int
    kind: str
    module: Branch


class VelocityTransformer(nn.Module):
    """Average velocity v(x_t, t, d, o) of an action chunk over [t, t + d].

    The step size d is given as a *level*: 0 is the instantaneous velocity (d = 0), level j >= 1 is the
    j-th doubling of the finest step. The three things that make up a call can be had one by one, so that a
    sampler computes each as rarely as possible:

    - ``encode(observation)``: cross-attention keys and values of every layer, once per observation;
      ``see(observation)`` runs the image encoders alone, for those who use their tokens elsewhere too;
    - ``modulations(t, level)``: adaLN shift, scale and gate of every block, tabulated per step;
    - ``velocity(x, modulations, context)``: what is left for each step.

    Conditioning is adaLN-zero (Peebles and Xie 2023) with one shared projection of the (t, level)
    embedding and a learned offset per layer (adaLN-single: Chen et al. 2023, PixArt-alpha).

    Args:
        config: sizes.
        action_dim: A.
        action_horizon: T.
        observation_shapes: key -> shape of one step.
        obs_horizon: T_o.
        num_levels: step-size levels, 1 where only d = 0 is asked for.
    """

    frequencies: Tensor

    def __init__(
        self,
        config: ModelConfig,
        action_dim: int,
        action_horizon: int,
        observation_shapes: Mapping[str, tuple[int, ...]],
        obs_horizon: int,
        num_levels: int = 1,
    ) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.encoder = build_encoder(observation_shapes, obs_horizon, config)
        self.embed_action = nn.Linear(action_dim, width)
        self.position = nn.Parameter(torch.randn(action_horizon, width).mul_(0.02))
        self.embed_time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_level = nn.Embedding(num_levels, width)
        self.modulate = nn.Linear(width, 9 * width)
        self.modulate_offset = nn.Parameter(torch.zeros(config.depth, 9 * width))
        self.modulate_output = nn.Linear(width, 2 * width)
        self.self_attention = nn.ModuleList(SelfAttention(config) for _ in range(config.depth))
        self.cross_attention = nn.ModuleList(CrossAttention(config) for _ in range(config.depth))
        self.feed_forward = nn.ModuleList(FeedForward(config) for _ in range(config.depth))
        self.output = nn.Linear(width, action_dim)
        half = width // 2
        frequencies = torch.linspace(math.log(1.0), math.log(100.0), half).exp_()
        self.register_buffer("frequencies", frequencies, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed_level.weight, std=0.02)
        # adaLN-zero: every block starts as the identity and the network as the zero velocity.
        for linear in (self.modulate, self.modulate_output, self.output):
            nn.init.zeros_(linear.weight)

    def blocks(self) -> Iterator[Block]:
        """Every residual branch in the order of computation: SA, CA, FFN of layer 0, of layer 1, ..."""
        for layer in range(self.config.depth):
            for modules in (self.self_attention, self.cross_attention, self.feed_forward):
                module = modules[layer]
                assert isinstance(module, Branch)
                yield Block(layer, str(module.kind), module)

    def see(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observation with images replaced by their tokens ``(B, num_tokens, d)``; vectors stay."""
        if isinstance(self.encoder, ObservationEncoder):
            return self.encoder.see(observation)
        return dict(observation)

    def encode(self, observation: Mapping[str, Tensor]) -> Context:
        """Keys and values of every layer for normalised observations, key -> ``(B, T_o, *shape)``; images
        may be replaced by their tokens.
        """
        tokens = self.encoder(observation)
        return [layer.project(tokens) for layer in self.cross_attention]  # type: ignore[operator]

    def modulations(self, t: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """adaLN parameters at flow times ``t`` ``(N,)`` and step levels ``(N,)``.

        Returns:
            ``(N, 3 * depth, 3, d)``, shift, scale and gate in the order of ``blocks()``, and ``(N, 2, d)``
            for the output layer. N is the batch or 1.
        """
        angles = t[:, None] * self.frequencies
        embedding = self.embed_time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.embed_level(level)
        embedding = F.silu(embedding)
        shared = self.modulate(embedding)[:, None] + self.modulate_offset
        blocks = shared.view(len(t), 3 * self.config.depth, 3, self.config.width)
        # Under autocast a product is bfloat16; the layer norm of one row takes its factor in float32 only.
        last = self.modulate_output(embedding).to(blocks.dtype)
        return blocks, last.view(len(t), 2, self.config.width)

    def enter(self, x: Tensor) -> Tensor:
        """The residual stream ``(B, T, d)`` at the first block for a normalised noisy chunk ``(B, T, A)``."""
        h: Tensor = self.embed_action(x) + self.position
        return h

    def leave(self, h: Tensor, modulation: Tensor) -> Tensor:
        """v ``(B, T, A)`` from the stream after the last block; ``modulation`` is ``(B or 1, 2, d)``."""
        shift, scale = spread(modulation, h.ndim)
        result: Tensor = self.output(modulate(h, shift, 1 + scale))
        return result

    def velocity(self, x: Tensor, modulations: tuple[Tensor, Tensor], context: Context) -> Tensor:
        """v ``(B, T, A)`` for a normalised noisy chunk ``x`` ``(B, T, A)``.

        N modulations can be had at once, for ``x`` ``(N, B, T, A)`` and B context rows.
        """
        per_block, last = modulations
        h = self.enter(x)
        for modulation, block in zip(per_block.unbind(1), self.blocks(), strict=True):
            h = h + block.module(h, modulation, context[block.layer])
        return self.leave(h, last)

    def forward(self, x: Tensor, t: Tensor, level: Tensor, context: Context) -> Tensor:
        """v(x, t, d, o) ``(B, T, A)``: ``x`` ``(B, T, A)``, ``t`` and ``level`` ``(B,)`` or ``(1,)``."""
        return self.velocity(x, self.modulations(t, level), context)
