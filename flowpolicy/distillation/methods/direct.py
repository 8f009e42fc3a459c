"""Direct distillation (Liu et al. 2024, InstaFlow): regression of the chunk from its own noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.distillation.method import FewSteps
from flowpolicy.flow.network import Network
from flowpolicy.flow.objective import Draws, Metrics, masked_mean


@dataclass(frozen=True, kw_only=True)
class Direct(FewSteps):
    """E || x_K - x_1 ||^2, where x_K is what K Euler steps of the student make of x_0.

    With K = 1 that is || v(x_0, 0, o) - (x_1 - x_0) ||^2; with more, gradients go through all steps.
    """

    name: ClassVar[str] = "direct"

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The masked mean squared error of the chunk."""
        chunk = self.sample(network, network.encode(batch.observation), draws.noise)
        loss = masked_mean((chunk - batch.action) ** 2, batch.mask)
        return loss, {"loss/direct": loss.detach()}
