"""SlimFlow (Zhu et al. 2024): a student of another size, which cannot start from the teacher's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowpolicy.distillation.methods.reflow import Reflow
from flowpolicy.flow.objective import Draws
from flowpolicy.ranges import Share


@dataclass(frozen=True, kw_only=True)
class SlimFlow(Reflow):
    """Annealing reflow, then distillation to K steps, in one training.

    Meanwhile x_0' = sqrt(1 - b^2) x_0 + b z with b from 1 to 0: the student begins with flow matching from
    fresh noise z, as the teacher did, and comes by and by to the pairs. Then t is where the K steps begin,
    so that with K = 1 the loss is that of the direct distillation.

    Attributes:
        annealing: share of the training after which b = 0.
    """

    name: ClassVar[str] = "slimflow"
    annealing: Share = 0.3

    def pair(self, draws: Draws, noise: Tensor, done: float) -> Draws:
        """Mix fresh noise into x_0, or move t to the beginning of its step."""
        b = max(0.0, 1 - done / self.annealing) if self.annealing else 0.0
        mixed = (1 - b * b) ** 0.5 * noise + b * draws.noise
        begin = torch.floor(draws.t * self.num_steps).clamp(max=self.num_steps - 1) / self.num_steps
        return Draws(mixed, draws.t if b else begin, draws.d)
