"""Conditional flow matching (Lipman et al. 2023; rectified flow, Liu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.flow.network import Network
from flowpolicy.flow.objective import Draws, Flow, Metrics, masked_mean
from flowpolicy.flow.path import interpolate, velocity_target
from flowpolicy.flow.sampler_spec import MOST_STEPS, SamplerSpec
from flowpolicy.flow.time_sampling import build_time_sampler
from flowpolicy.ranges import PositiveInt, at_most


@dataclass(frozen=True)
class FlowMatching(Flow):
    """E || v(x_t, t, 0, o) - (x_1 - x_0) ||^2.

    Attributes:
        time_sampling: distribution of t, a name or a mapping with ``name`` and parameters.
        default_num_steps: K used where a caller names none.
        default_solver: likewise; Euler's in checkpoints that were made before there was another default.
        default_grid: likewise; None is the uniform one.
    """

    name: ClassVar[str] = "flow_matching"
    time_sampling: dict[str, Any] = field(default_factory=lambda: {"name": "uniform"})
    default_num_steps: Annotated[PositiveInt, at_most(MOST_STEPS)] = 4
    default_solver: str = "euler"
    default_grid: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        build_time_sampler(self.time_sampling)
        self.check(self.default_sampling())

    def default_sampling(self) -> SamplerSpec:
        """K, solver and grid where a caller names none."""
        return SamplerSpec(
            num_steps=self.default_num_steps, solver=self.default_solver, grid=self.default_grid
        )

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """x_0 and t for a batch of ``shape`` (B, T, A)."""
        noise = torch.randn(shape, generator=generator, device=device)
        t = build_time_sampler(self.time_sampling)(shape[0], generator, device)
        return Draws(noise, t, torch.zeros_like(t))

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The masked mean squared error of the velocity."""
        x = interpolate(draws.noise, batch.action, draws.t)
        velocity = network.velocity(x, draws.t, draws.d, network.encode(batch.observation))
        loss = masked_mean((velocity - velocity_target(draws.noise, batch.action)) ** 2, batch.mask)
        return loss, {"loss/flow_matching": loss.detach()}
