"""The step size d as an input of a network: a table of powers of two, interpolated."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StepSizeEmbedding(nn.Embedding):
    """Embeds step sizes d in [0, 1].

    Row 0 stands for d = 0 and for the finest step 1/M, row j for 2^j / M; M = 2^(levels - 1). Between two
    rows the embedding is linear in log2 d, so that a shortcut model's grid of steps and the continuous ones
    of a mean-flow model are asked of the same network.

    Args:
        levels: rows, log2 M + 1; with a single one d plays no part.
        width: channels.
    """

    def __init__(self, levels: int, width: int) -> None:
        super().__init__(levels, width)

    def forward(self, d: Tensor) -> Tensor:
        """``(N, width)`` for step sizes ``(N,)``."""
        last = self.num_embeddings - 1
        position = torch.log2((d * 2**last).clamp(min=1.0)).clamp(max=last)
        lower = position.detach().floor()
        share = (position - lower)[:, None]
        index = lower.long()
        below: Tensor = super().forward(index)
        above: Tensor = super().forward((index + 1).clamp(max=last))
        return (1 - share) * below + share * above
