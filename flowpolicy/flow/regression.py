"""Plain regression: behaviour cloning by mean squared error, behind the same interface as the flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.errors import ConfigError
from flowpolicy.flow.objective import Draws, Metrics, Network, at_time, masked_mean


@dataclass(frozen=True)
class Regression:
    """E || f(o) - x_1 ||^2, f(o) = v(0, 0, 0, o): the network sees neither noise nor time."""

    name: ClassVar[str] = "regression"
    default_num_steps: int = 1

    def __post_init__(self) -> None:
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
        """Zeros: nothing is random."""
        count = torch.zeros(shape[0], device=device)
        return Draws(torch.zeros(shape, device=device), count, count.long())

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The masked mean squared error of the action."""
        prediction = network(draws.noise, draws.t, draws.level, network.encode(batch.observation))
        loss = masked_mean((prediction - batch.action) ** 2, batch.mask)
        return loss, {"loss/regression": loss.detach()}

    def check_steps(self, num_steps: int, solver: str) -> None:
        """One evaluation, nothing to integrate."""
        if num_steps != 1 or solver != "euler":
            raise ConfigError(
                f"A regression policy has one step; num_steps={num_steps}, solver={solver} is refused."
            )

    def nfe(self, num_steps: int, solver: str) -> int:
        """One."""
        return 1

    def level_of(self, num_steps: int) -> int:
        """Refused: no flow is integrated."""
        raise ConfigError(
            "A regression policy has no flow to fine-tune; take a flow_matching or a shortcut one."
        )

    def sample(self, network: Network, context: Any, noise: Tensor, num_steps: int, solver: str) -> Tensor:
        """The prediction; ``noise`` gives only the shape."""
        self.check_steps(num_steps, solver)
        return at_time(network, context, level=0)(torch.zeros_like(noise), 0.0)
