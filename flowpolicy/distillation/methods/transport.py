"""MDT-dist (Zhou et al. 2025): the transport of the teacher by its velocity, without its chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.distillation.method import FewSteps
from flowpolicy.errors import ConfigError
from flowpolicy.flow.network import Context, Network
from flowpolicy.flow.objective import Draws, Metrics, masked_mean
from flowpolicy.flow.path import interpolate, per_sample
from flowpolicy.flow.time_sampling import LogitNormal
from flowpolicy.ranges import NonNegativeFloat, within

SOFTENING = 0.1
"""c of du/dt / (|du/dt| + c), norms over a chunk."""


@dataclass(frozen=True, kw_only=True)
class Transport(FewSteps):
    """u(x_t, t) is to be the mean velocity of the teacher's flow from t to the end e of the student's step.

    Its derivative along that flow says what that is: u = v + (e - t) du/dt with the teacher's v. *Velocity
    matching* regresses u to the right-hand side, at noised chunks. *Velocity distillation* moves the
    student's own chunks by the same error, met where they are noised. As in the authors' code du/dt is
    softened to a norm below 1, which is stable and a bias where u changes faster along the flow.

    Attributes:
        interval: of the finite difference du/dt.
        distribution: weight of the velocity distillation.
    """

    name: ClassVar[str] = "transport"
    interval: Annotated[float, within("(0, 0.5]")] = 0.01
    distribution: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher.config.tuned is not None:
            raise ConfigError(
                f"This teacher is tuned for {self.teacher.config.tuned}, and elsewhere it has no velocity to "
                "match; choose another method."
            )

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """The t of the noised chunks, mostly near the noise."""
        t = LogitNormal(mean=-1.0)(shape[0], generator, device) * (1 - self.interval)
        return Draws(torch.zeros(shape, device=device), t, torch.full_like(t, self.step_size))

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The sum of both parts."""
        context = network.encode(batch.observation)
        with torch.no_grad():
            known = self.teacher.network.encode(batch.observation)
        noise = draws.noise.roll(1, 0)  # of another row: no pair
        error = self._error(network, context, known, interpolate(noise, batch.action, draws.t), draws)
        matching = masked_mean(error**2, batch.mask)
        chunk = self.sample(network, context, draws.noise)
        with torch.no_grad():
            moved = self._error(network, context, known, interpolate(noise, chunk, draws.t), draws)
        distilled = masked_mean((moved + chunk - chunk.detach()) ** 2, batch.mask)
        metrics = {
            "loss/velocity_matching": matching.detach(),
            "loss/velocity_distillation": distilled.detach(),
        }
        return matching + self.distribution * distilled, metrics

    def _error(self, network: Network, context: Context, known: Context, x: Tensor, draws: Draws) -> Tensor:
        """u - (v + (e - t) du/dt), the latter without gradient."""
        t, d = draws.t, draws.d
        u = network.velocity(x, t, d, context)
        with torch.no_grad():
            v = self.teacher.network.velocity(x, t, torch.zeros_like(d), known)
            later = network.velocity(x + self.interval * v, t + self.interval, d, context)
            change = (later - u) / self.interval
            change = change / (change.flatten(1).norm(dim=1)[:, None, None] + SOFTENING)
            left = (torch.floor(t * self.num_steps) + 1) / self.num_steps - t
            target: Tensor = v + per_sample(left, x) * change
        return u - target
