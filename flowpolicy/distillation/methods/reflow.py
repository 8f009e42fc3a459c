"""One round of reflow (Liu et al. 2023), trained as Lee et al. (2024) train it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.distillation.method import FewSteps
from flowpolicy.flow.network import Network
from flowpolicy.flow.objective import Draws, Metrics
from flowpolicy.flow.path import interpolate, velocity_target
from flowpolicy.flow.time_sampling import UShaped
from flowpolicy.ranges import positive_to

HUBER = 0.00054
"""c over the numbers of a chunk (Lee et al. 2024, section 4.2)."""


@dataclass(frozen=True, kw_only=True)
class Reflow(FewSteps):
    """Flow matching along the line from x_0 to the chunk that the teacher makes of it.

    The lines of pairs hardly cross, so what is learnt is nearly straight, and a few steps go along it.

    Attributes:
        a: of the times p(t) ~ e^{at} + e^{a(1-t)}, which are mostly near the ends.
    """

    name: ClassVar[str] = "reflow"
    a: Annotated[float, positive_to(100)] = 4.0

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """x_0 for methods that mix some in, t, and the d of a step."""
        noise = torch.randn(shape, generator=generator, device=device)
        t = UShaped(self.a)(shape[0], generator, device)
        return Draws(noise, t, torch.full_like(t, self.step_size))

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The mean of sqrt(|e|^2 + c^2) - c over the velocity errors e of the batch, over their length."""
        x = interpolate(draws.noise, batch.action, draws.t)
        velocity = network.velocity(x, draws.t, draws.d, network.encode(batch.observation))
        error = (velocity - velocity_target(draws.noise, batch.action)).flatten(1)
        size = error.shape[1]
        squared, c = error.square().sum(1), HUBER * size
        loss = ((squared + c * c).sqrt() - c).mean() / size**0.5
        return loss, {"loss/reflow": (squared.detach() / size).mean()}
