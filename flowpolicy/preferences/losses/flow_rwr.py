"""Flow-RWR: reward-weighted regression (Peters and Schaal 2007) of the velocity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.flow.network import Network
from flowpolicy.flow.objective import Draws, Metrics
from flowpolicy.flow.path import velocity_target
from flowpolicy.preferences.loss import PreferenceLoss, squared_distance, velocity_at
from flowpolicy.ranges import PositiveFloat


@dataclass(frozen=True, kw_only=True)
class FlowRWR(PreferenceLoss):
    """(w - 1) |v(x_t, t, o) - u|^2 + |v - v_ref|^2 over the executed actions, as a mean over all actions.

    w is exp(r / tau) over its mean in the batch. r is the reward of the segment, relative to the pair's mean
    and with standard deviation 1, or 1 and -1 where a person preferred one. In expectation over chunks from
    the flow that acted, E[u] = v_ref, the gradient is that of w |v - u|^2; but where rewards say nothing it
    is zero at v_ref, whatever the chunks: a policy does not learn its own deviations.

    Attributes:
        tau: the smaller, the more the best segments count.
    """

    name: ClassVar[str] = "flow_rwr"
    tau: PositiveFloat = 1.0

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The mean over rows."""
        assert batch.reward is not None
        with torch.no_grad():
            before = velocity_at(self.reference.network, batch, draws)
        velocity, u = velocity_at(network, batch, draws), velocity_target(draws.noise, batch.action)
        weight = (batch.reward / self.tau).softmax(0) * len(batch)
        errors, moved = (squared_distance(velocity, other, batch) for other in (u, before))
        loss = ((weight - 1) * errors + moved).mean() / batch.action[0].numel()
        return loss, {"loss/flow_matching": errors.detach().mean(), "loss/moved": moved.detach().mean()}
