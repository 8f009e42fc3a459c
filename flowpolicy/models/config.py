"""Settings of the networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.models.network import NetworkConfig
from flowpolicy.ranges import BelowOne, PositiveInt, between
from flowpolicy.settings import require


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(NetworkConfig):
    """What every network with the observation encoders of this package has.

    Attributes:
        width: channels of a token, d.
        tokens_per_step: observation tokens made from one observation step.
        vision: how images become tokens.
    """

    width: Annotated[int, between(1, 8192)] = 96
    tokens_per_step: Annotated[int, between(1, 64)] = 2
    vision: VisionConfig = field(default_factory=VisionConfig)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(EncoderConfig):
    """The transformer's sizes.

    Attributes:
        depth: layers, each of a self-attention, a cross-attention and a feed-forward block.
        num_heads: attention heads; ``width`` is a multiple of twice their number.
        feedforward_ratio: hidden channels of the feed-forward block over ``width``.
        dropout: probability, on each block's output and the feed-forward block's hidden layer.
        actions_per_token: consecutive actions that make one token; the whole chunk, where it is shorter.
    """

    network: str = "transformer"
    depth: Annotated[int, between(1, 128)] = 3
    num_heads: Annotated[int, between(1, 128)] = 4
    feedforward_ratio: Annotated[int, between(1, 16)] = 4
    dropout: BelowOne = 0.0
    actions_per_token: PositiveInt = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        twice = 2 * self.num_heads
        allowed = f"a multiple of 2 * model.num_heads = {twice}"
        require(self.width % twice == 0, "model.width", self.width, allowed)


@dataclass(frozen=True, kw_only=True)
class MLPConfig(EncoderConfig):
    """The sizes of a residual MLP.

    Attributes:
        depth: residual layers.
        hidden: channels of a layer.
    """

    network: str = "mlp"
    depth: Annotated[int, between(1, 128)] = 3
    hidden: Annotated[int, between(1, 8192)] = 512
