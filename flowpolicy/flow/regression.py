"""Plain regression: behaviour cloning by mean squared error, behind the same interface as the flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.errors import ConfigError
from flowpolicy.flow.network import Network, Velocity
from flowpolicy.flow.objective import Draws, Metrics, Objective, masked_mean
from flowpolicy.flow.sampler_spec import SamplerSpec


@dataclass(frozen=True)
class Regression(Objective):
    """E || f(o) - x_1 ||^2, f(o) = v(0, 0, 0, o): the network sees neither noise nor time."""

    name: ClassVar[str] = "regression"
    default_num_steps: int = 1

    def __post_init__(self) -> None:
        self.check(SamplerSpec(num_steps=self.default_num_steps, solver="euler"))

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """Zeros: nothing is random."""
        zeros = torch.zeros(shape[0], device=device)
        return Draws(torch.zeros(shape, device=device), zeros, zeros)

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The masked mean squared error of the action."""
        prediction = network.velocity(draws.noise, draws.t, draws.d, network.encode(batch.observation))
        loss = masked_mean((prediction - batch.action) ** 2, batch.mask)
        return loss, {"loss/regression": loss.detach()}

    def check(self, spec: SamplerSpec) -> None:
        """One evaluation, nothing to integrate."""
        if spec.num_steps != 1 or spec.solver != "euler" or spec.grid:
            raise ConfigError(f"A regression policy has one step; {spec} is refused.")

    def sample(self, velocity: Velocity, noise: Tensor, spec: SamplerSpec) -> Tensor:
        """The prediction; ``noise`` gives only the shape."""
        return velocity(0.0 * noise, 0.0, 0.0)
