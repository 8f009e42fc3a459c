"""Flow-RWR: reward-weighted regression (Peters and Schaal 2007) of the velocity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.flow.network import Network
from flowpolicy.flow.objective import Draws, Metrics
from flowpolicy.flow.path import velocity_target
from flowpolicy.preferences.loss import PreferenceLoss, squared_distance, velocity_at
from flowpolicy.ranges import PositiveFloat


@dataclass(frozen=True, kw_only=True)
class FlowRWR(PreferenceLoss):
    """exp(r / tau) |v(x_t, t, o) - u|^2 over the executed actions, as a mean over all actions.

    r is the reward of the segment, relative to the pair's mean and with standard deviation 1, or 1 and -1
    where a person preferred one.

    Attributes:
        tau: the smaller, the more the best segments count.
    """

    name: ClassVar[str] = "flow_rwr"
    tau: PositiveFloat = 1.0

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The weighted mean squared error."""
        assert batch.reward is not None
        u = velocity_target(draws.noise, batch.action)
        errors = squared_distance(velocity_at(network, batch, draws), u, batch) / batch.action[0].numel()
        return ((batch.reward / self.tau).exp() * errors).mean(), {
            "loss/flow_matching": errors.detach().mean()
        }
