"""MIP, minimal iterative policy (Pan et al. 2025, "Much Ado About Noising"): regression in two steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.errors import ConfigError
from flowpolicy.flow.objective import Draws, Metrics, Network, at_time, masked_mean
from flowpolicy.flow.path import interpolate
from flowpolicy.settings import require


@dataclass(frozen=True)
class MIP:
    """E || f(0, 0, o) - x_1 ||^2 + E || f(x_s, s, o) - x_1 ||^2, x_s = s x_1 + (1 - s) x_0.

    The second prediction learns to repair a slightly wrong first one. Sampling has no noise: the first
    prediction, scaled by s, takes the place of x_s.

    Attributes:
        second_time: s, in (0, 1).
    """

    name: ClassVar[str] = "mip"
    second_time: float = 0.9
    default_num_steps: int = 2

    def __post_init__(self) -> None:
        require(0.0 < self.second_time < 1.0, "policy.second_time", self.second_time, "in (0, 1)")
        self.check_steps(self.default_num_steps, "euler")

    @property
    def num_levels(self) -> int:
        """Step sizes play no part."""
        return 1

    @property
    def row_multiple(self) -> int:
        """Rows are independent."""
        return 1

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """The noise of the second prediction, and its time."""
        noise = torch.randn(shape, generator=generator, device=device)
        t = torch.full((shape[0],), self.second_time, device=device)
        return Draws(noise, t, torch.zeros(shape[0], dtype=torch.int64, device=device))

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The sum of the two masked mean squared errors."""
        context = network.encode(batch.observation)
        blank = torch.zeros_like(batch.action)
        first = network(blank, torch.zeros_like(draws.t), draws.level, context)
        second = network(interpolate(draws.noise, batch.action, draws.t), draws.t, draws.level, context)
        first_loss = masked_mean((first - batch.action) ** 2, batch.mask)
        second_loss = masked_mean((second - batch.action) ** 2, batch.mask)
        metrics = {"loss/first_step": first_loss.detach(), "loss/second_step": second_loss.detach()}
        return first_loss + second_loss, metrics

    def check_steps(self, num_steps: int, solver: str) -> None:
        """Two evaluations."""
        if num_steps != 2 or solver != "euler":
            raise ConfigError(
                f"A MIP policy has two steps; num_steps={num_steps}, solver={solver} is refused."
            )

    def nfe(self, num_steps: int, solver: str) -> int:
        """Two."""
        return 2

    def level_of(self, num_steps: int) -> int:
        """Refused: no flow is integrated."""
        raise ConfigError("A mip policy has no flow to fine-tune; take a flow_matching or a shortcut one.")

    def sample(self, network: Network, context: Any, noise: Tensor, num_steps: int, solver: str) -> Tensor:
        """The second prediction; ``noise`` gives only the shape."""
        self.check_steps(num_steps, solver)
        predict = at_time(network, context, level=0)
        return predict(self.second_time * predict(torch.zeros_like(noise), 0.0), self.second_time)
