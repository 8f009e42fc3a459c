"""Settings of the networks."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.models.network import NetworkConfig
from flowpolicy.settings import require

LARGEST = {"width": 8192, "depth": 128, "num_heads": 128, "feedforward_ratio": 16, "tokens_per_step": 64}
"""Sizes beyond which no policy of this kind is built."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(NetworkConfig):
    """What every network with the observation encoders of this package has.

    Attributes:
        width: channels of a token, d.
        tokens_per_step: observation tokens made from one observation step.
        vision: how images become tokens.
    """

    width: int = 96
    tokens_per_step: int = 2
    vision: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            value = getattr(self, name, 1)
            require(1 <= value <= most, f"model.{name}", value, f"between 1 and {most}")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(EncoderConfig):
    """The transformer's sizes.

    Attributes:
        depth: layers, each of a self-attention, a cross-attention and a feed-forward block.
        num_heads: attention heads; ``width`` is a multiple of twice their number.
        feedforward_ratio: hidden channels of the feed-forward block over ``width``.
        dropout: probability, on each block's output and the feed-forward block's hidden layer.
    """

    network: str = "transformer"
    depth: int = 3
    num_heads: int = 4
    feedforward_ratio: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.width % (2 * self.num_heads) == 0,
            "model.width",
            self.width,
            f"a multiple of 2 * model.num_heads = {2 * self.num_heads}",
        )
        require(0.0 <= self.dropout < 1.0, "model.dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class MLPConfig(EncoderConfig):
    """The sizes of a residual MLP.

    Attributes:
        depth: residual layers.
        hidden: channels of a layer.
    """

    network: str = "mlp"
    depth: int = 3
    hidden: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.hidden <= LARGEST["width"], "model.hidden", self.hidden, f"at most {LARGEST['width']}"
        )
