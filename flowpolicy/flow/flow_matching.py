"""Conditional flow matching (Lipman et al. 2023; rectified flow, Liu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.flow.objective import MOST_STEPS, Draws, Metrics, Network, at_time, masked_mean
from flowpolicy.flow.path import interpolate, velocity_target
from flowpolicy.flow.solvers import SOLVERS, integrate
from flowpolicy.flow.time_sampling import build_time_sampler
from flowpolicy.settings import choose, require


@dataclass(frozen=True)
class FlowMatching:
    """E || v(x_t, t, 0, o) - (x_1 - x_0) ||^2.

    Attributes:
        time_sampling: distribution of t, a name or a mapping with ``name`` and parameters.
        default_num_steps: K used where a caller names none.
    """

    name: ClassVar[str] = "flow_matching"
    time_sampling: dict[str, Any] = field(default_factory=lambda: {"name": "uniform"})
    default_num_steps: int = 4

    def __post_init__(self) -> None:
        build_time_sampler(self.time_sampling)
        steps = self.default_num_steps
        require(
            1 <= steps <= MOST_STEPS,
            "policy.default_num_steps",
            steps,
            f"at least 1 and at most {MOST_STEPS}",
        )

    @property
    def num_levels(self) -> int:
        """Only d = 0."""
        return 1

    @property
    def row_multiple(self) -> int:
        """Rows are independent."""
        return 1

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """x_0 and t for a batch of ``shape`` (B, T, A)."""
        noise = torch.randn(shape, generator=generator, device=device)
        t = build_time_sampler(self.time_sampling)(shape[0], generator, device)
        return Draws(noise, t, torch.zeros(shape[0], dtype=torch.int64, device=device))

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The masked mean squared error of the velocity."""
        x = interpolate(draws.noise, batch.action, draws.t)
        velocity = network(x, draws.t, draws.level, network.encode(batch.observation))
        loss = masked_mean((velocity - velocity_target(draws.noise, batch.action)) ** 2, batch.mask)
        return loss, {"loss/flow_matching": loss.detach()}

    def check_steps(self, num_steps: int, solver: str) -> None:
        """Any K from 1 to ``MOST_STEPS``, any solver."""
        require(1 <= num_steps <= MOST_STEPS, "num_steps", num_steps, f"at least 1 and at most {MOST_STEPS}")
        choose(SOLVERS, solver, "solver")

    def nfe(self, num_steps: int, solver: str) -> int:
        """K times the solver's evaluations a step."""
        return num_steps * SOLVERS[solver].evaluations

    def level_of(self, num_steps: int) -> int:
        """0, the instantaneous velocity, whatever K."""
        return 0

    def sample(self, network: Network, context: Any, noise: Tensor, num_steps: int, solver: str) -> Tensor:
        """Integrate from x_0 at t = 0 to t = 1."""
        self.check_steps(num_steps, solver)
        return integrate(at_time(network, context, level=0), noise, num_steps, SOLVERS[solver])
