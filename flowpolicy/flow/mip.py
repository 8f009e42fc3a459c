"""MIP, minimal iterative policy (Pan et al. 2025, "Much Ado About Noising"): regression in two steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.errors import ConfigError
from flowpolicy.flow.network import Network, Velocity
from flowpolicy.flow.objective import Draws, Metrics, Objective, masked_mean
from flowpolicy.flow.path import interpolate
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.ranges import within


@dataclass(frozen=True)
class MIP(Objective):
    """E || f(0, 0, o) - x_1 ||^2 + E || f(x_s, s, o) - x_1 ||^2, x_s = s x_1 + (1 - s) x_0.

    The second prediction learns to repair a slightly wrong first one. Sampling has no noise: the first
    prediction, scaled by s, takes the place of x_s.

    Attributes:
        second_time: s, in (0, 1).
    """

    name: ClassVar[str] = "mip"
    second_time: Annotated[float, within("(0, 1)")] = 0.9
    default_num_steps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(SamplerSpec(num_steps=self.default_num_steps, solver="euler"))

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """The noise of the second prediction, and its time."""
        noise = torch.randn(shape, generator=generator, device=device)
        t = torch.full((shape[0],), self.second_time, device=device)
        return Draws(noise, t, torch.zeros_like(t))

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The sum of the two masked mean squared errors."""
        context = network.encode(batch.observation)
        blank = torch.zeros_like(batch.action)
        first = network.velocity(blank, torch.zeros_like(draws.t), draws.d, context)
        second = network.velocity(interpolate(draws.noise, batch.action, draws.t), draws.t, draws.d, context)
        first_loss = masked_mean((first - batch.action) ** 2, batch.mask)
        second_loss = masked_mean((second - batch.action) ** 2, batch.mask)
        metrics = {"loss/first_step": first_loss.detach(), "loss/second_step": second_loss.detach()}
        return first_loss + second_loss, metrics

    def check(self, spec: SamplerSpec) -> None:
        """Two evaluations."""
        if spec.num_steps != 2 or spec.solver != "euler" or spec.grid:
            raise ConfigError(f"A MIP policy has two steps; {spec} is refused.")

    def sample(self, velocity: Velocity, noise: Tensor, spec: SamplerSpec) -> Tensor:
        """The second prediction; ``noise`` gives only the shape."""
        first = velocity(0.0 * noise, 0.0, 0.0)
        return velocity(self.second_time * first, self.second_time, 0.0)
