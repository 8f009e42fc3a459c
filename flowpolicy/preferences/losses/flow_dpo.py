"""Flow-DPO (Liu et al. 2025, "Improving Video Generation with Human Feedback")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.flow.network import Network
from flowpolicy.flow.objective import Draws, Metrics
from flowpolicy.flow.path import velocity_target
from flowpolicy.preferences.loss import PreferenceLoss, squared_distance, velocity_at
from flowpolicy.ranges import NonNegativeFloat, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class FlowDPO(PreferenceLoss):
    """-log sigmoid(-beta / 2 [(|v(x^w) - u^w|^2 - |v_ref(x^w) - u^w|^2) - (the same of x^l)]).

    w is the preferred chunk of a pair, l the other. beta is the same at every t, as published; beta t^2,
    which the bound of diffusion models gives, hardly learns near the noise.

    Attributes:
        beta: of the preference.
        pull: weight of |v - v_ref|^2, as a mean over all rows. The preference compares two chunks, and alone
            it lets both become unlikely.
    """

    name: ClassVar[str] = "flow_dpo"
    beta: PositiveFloat = 1.0
    pull: NonNegativeFloat = 0.2

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """The mean over pairs; ``loss/accuracy`` is the share whose preferred chunk has become likelier."""
        with torch.no_grad():
            before = velocity_at(self.reference.network, batch, draws)
        velocity, u = velocity_at(network, batch, draws), velocity_target(draws.noise, batch.action)
        change = squared_distance(velocity, u, batch) - squared_distance(before, u, batch)
        logit = self.beta / 2 * (change[1::2] - change[0::2])
        moved = squared_distance(velocity, before, batch).mean()
        loss = -F.logsigmoid(logit).mean() + self.pull * moved
        metrics = {
            "loss/accuracy": (logit.detach() > 0).float().mean(),
            "loss/change_preferred": change[0::2].detach().mean(),
            "loss/change_other": change[1::2].detach().mean(),
            "loss/moved": moved.detach(),
        }
        return loss, metrics
