"""The default velocity network: a transformer over action tokens that attends to observation tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpolicy.models.blocks import (
    AddressableBlocks,
    Block,
    Branch,
    CrossAttention,
    FeedForward,
    KeyValue,
    SelfAttention,
    modulate,
    spread,
)
from flowpolicy.models.config import TransformerConfig
from flowpolicy.models.encoders import build_encoder
from flowpolicy.models.network import NETWORKS, VelocityNetwork
from flowpolicy.models.step_size import StepSizeEmbedding
from flowpolicy.plugins import register
from flowpolicy.spec import PolicySpec

Context = list[KeyValue]  # one entry a layer


@register(NETWORKS)
class VelocityTransformer(AddressableBlocks, VelocityNetwork):
    """Average velocity v(x_t, t, d, o) of an action chunk over [t, t + d].

    Conditioning is adaLN-zero (Peebles and Xie 2023) with one shared projection of the (t, d) embedding and a
    learned offset per layer (adaLN-single: Chen et al. 2023, PixArt-alpha). Its residual branches are
    addressable blocks, whose modulations a sampler tabulates: see :class:`AddressableBlocks`. Consecutive
    actions may share a token, as the pixels of a patch do in a DiT.

    Args:
        config: sizes.
        spec: its observations and actions.
        levels: step sizes that it tells apart, 1 where only d = 0 is asked for.
    """

    name: ClassVar[str] = "transformer"
    Config = TransformerConfig
    frequencies: Tensor

    def __init__(self, config: TransformerConfig, spec: PolicySpec, levels: int = 1) -> None:
        super().__init__(config, spec, levels)
        width = config.width
        self.config = config
        self.encoder = build_encoder(spec.features, spec.obs_horizon, config)
        self.action_horizon = spec.action_horizon
        self.per_token = min(config.actions_per_token, spec.action_horizon)
        self.embed_action = nn.Linear(self.per_token * spec.action_dim, width)
        self.num_tokens = math.ceil(spec.action_horizon / self.per_token)
        self.position = nn.Parameter(torch.randn(self.num_tokens, width).mul_(0.02))
        self.embed_time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_level = StepSizeEmbedding(levels, width)
        self.modulate = nn.Linear(width, 9 * width)
        self.modulate_offset = nn.Parameter(torch.zeros(config.depth, 9 * width))
        self.modulate_output = nn.Linear(width, 2 * width)
        self.self_attention = nn.ModuleList(SelfAttention(config) for _ in range(config.depth))
        self.cross_attention = nn.ModuleList(CrossAttention(config) for _ in range(config.depth))
        self.feed_forward = nn.ModuleList(FeedForward(config) for _ in range(config.depth))
        self.output = nn.Linear(width, self.per_token * spec.action_dim)
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

    def encode_images(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observation with images replaced by their tokens ``(B, num_tokens, d)``; the rest stays."""
        return self.encoder.encode_images(observation)

    def encode(self, observation: Mapping[str, Tensor]) -> Context:
        """Keys and values of every layer for normalised observations, key -> ``(B, T_o, *shape)``; images
        may be replaced by their tokens.
        """
        tokens = self.encoder(observation)
        return [layer.project(tokens) for layer in self.cross_attention]  # type: ignore[operator]

    def modulations(self, t: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`AddressableBlocks`."""
        angles = t[:, None] * self.frequencies
        embedding = self.embed_time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.embed_level(d)
        embedding = F.silu(embedding)
        shared = self.modulate(embedding)[:, None] + self.modulate_offset
        blocks = shared.view(len(t), 3 * self.config.depth, 3, self.config.width)
        # Under autocast a product is bfloat16; the layer norm of one row takes its factor in float32 only.
        last = self.modulate_output(embedding).to(blocks.dtype)
        return blocks, last.view(len(t), 2, self.config.width)

    def embed(self, x: Tensor) -> Tensor:
        """See :class:`AddressableBlocks`."""
        h: Tensor = self.embed_action(_grouped(x, self.per_token)) + self.position
        return h

    def readout(self, h: Tensor, modulation: Tensor) -> Tensor:
        """See :class:`AddressableBlocks`."""
        shift, scale = spread(modulation, h.ndim)
        tokens = self.output(modulate(h, shift, 1 + scale))
        return _separated(tokens, self.per_token, self.action_horizon)


def _grouped(actions: Tensor, size: int) -> Tensor:
    """Every ``size`` actions of ``(..., T, A)`` as a row of ``(size A,)``, the last filled up with zeros."""
    if size == 1:
        return actions
    *batch, length, width = actions.shape
    padding = -length % size
    if padding:
        actions = F.pad(actions, (0, 0, 0, padding))
    return actions.reshape(*batch, (length + padding) // size, size * width)


def _separated(rows: Tensor, size: int, length: int) -> Tensor:
    """The first ``length`` actions ``(..., T, A)`` of rows of ``size``; what stands for zeros is dropped."""
    if size == 1:
        return rows
    *batch, count, width = rows.shape
    return rows.reshape(*batch, count * size, width // size)[..., :length, :]
