"""Mean flows (Geng et al. 2025): one network for steps of any size, trained by its own derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowpolicy.data.sampling import Batch
from flowpolicy.flow.network import Network
from flowpolicy.flow.objective import Draws, Flow, Metrics, masked_mean
from flowpolicy.flow.path import interpolate, per_sample, velocity_target
from flowpolicy.flow.sampler_spec import MOST_STEPS
from flowpolicy.ranges import PositiveInt, Share, at_most

SOFTENING = 1e-3
"""c of the adaptive weight 1 / (|e|^2 + c), with the mean square e of a row."""


@dataclass(frozen=True)
class MeanFlow(Flow):
    """u(x_t, t, d) = v + d (v du/dx + du/dt - du/dd), with v = x_1 - x_0.

    u is the average velocity over [t, t + d]: d u is the integral of the velocity, whose derivative along the
    path, the end held, is that identity (equation 6, whose r and t are 1 - t - d and 1 - t here). Its right
    side is the target, without gradient.

    Attributes:
        instantaneous: share of the batch with d = 0, which is flow matching.
        default_num_steps: K used where a caller names none.
    """

    name: ClassVar[str] = "mean_flow"
    instantaneous: Share = 0.75
    default_num_steps: Annotated[PositiveInt, at_most(MOST_STEPS)] = 1

    @property
    def levels(self) -> int:
        """The network embeds d = 1/128, ..., 1/2, 1, and interpolates between them."""
        return 8

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """x_0, and the ends of a step that two uniform times are."""
        noise = torch.randn(shape, generator=generator, device=device)
        begin, end = torch.rand(2, shape[0], generator=generator, device=device).sort(0).values
        is_flow = torch.rand(shape[0], generator=generator, device=device) < self.instantaneous
        return Draws(noise, begin, torch.where(is_flow, 0.0, end - begin))

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The masked mean squared error, each row over its own size (their adaptive weight with p = 1)."""
        context = network.encode(batch.observation)
        x, v = interpolate(draws.noise, batch.action, draws.t), velocity_target(draws.noise, batch.action)
        one = torch.ones_like(draws.t)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
            u, change = jvp(
                lambda x, t, d: network.velocity(x, t, d, context), (x, draws.t, draws.d), (v, one, -one)
            )[:2]
        error = (u - (v + per_sample(draws.d, u) * change.detach())) ** 2
        size = (error.detach() * batch.mask[..., None]).mean((1, 2), keepdim=True)
        weight = 1 / (size + SOFTENING)
        return masked_mean(weight * error, batch.mask), {
            "loss/mean_flow": masked_mean(error.detach(), batch.mask)
        }

    def step_size(self, h: float) -> float:
        """The step itself."""
        return h
