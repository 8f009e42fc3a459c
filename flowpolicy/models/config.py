"""Sizes of the velocity network."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowpolicy.models.vision.config import VisionConfig
from flowpolicy.settings import require

LARGEST = {"width": 8192, "depth": 128, "num_heads": 128, "feedforward_ratio": 16, "tokens_per_step": 64}
"""Sizes beyond which no policy of this kind is built."""


@dataclass(frozen=True)
class ModelConfig:
    """The transformer's sizes.

    Attributes:
        width: channels of a token, d.
        depth: layers, each of a self-attention, a cross-attention and a feed-forward block.
        num_heads: attention heads; ``width`` is a multiple of twice their number.
        feedforward_ratio: hidden channels of the feed-forward block over ``width``.
        tokens_per_step: observation tokens made from one observation step.
        dropout: probability, on each block's output and the feed-forward block's hidden layer.
        vision: how images become tokens.
    """

    width: int = 96
    depth: int = 3
    num_heads: int = 4
    feedforward_ratio: int = 4
    tokens_per_step: int = 2
    dropout: float = 0.0
    vision: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            value = getattr(self, name)
            require(1 <= value <= most, f"model.{name}", value, f"between 1 and {most}")
        require(
            self.width % (2 * self.num_heads) == 0,
            "model.width",
            self.width,
            f"a multiple of 2 * model.num_heads = {2 * self.num_heads}",
        )
        require(0.0 <= self.dropout < 1.0, "model.dropout", self.dropout, "in [0, 1)")
