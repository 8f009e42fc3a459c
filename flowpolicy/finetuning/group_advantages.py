"""Advantages among a group of branches that were played from one state."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from flowpolicy.finetuning.advantages import GAE, Array, Experience
from flowpolicy.ranges import Share, between, within
from flowpolicy.settings import Settings


@dataclass(frozen=True)
class GroupAdvantages(Settings, prefix="advantages"):
    """A chunk against those of the other branches of its group (after Shao et al. 2024, GRPO).

    G environments play ``branch_length`` chunks from one simulator state. Of the chunk at each place of
    branch i,

        A_i = D_i - mean_{j != i} D_j,

    D being GAE within the branch, at whose end the critic's value stands for what is not played. The other
    branches do not depend on chunk i, so that their mean is a baseline without bias (Kool et al. 2019). At
    the first place the critic's value of the common state cancels. The critic learns GAE's returns, those of
    the first branch beyond its end.

    Attributes:
        gamma: discount per environment step.
        gae_lambda: weight of longer estimates, per chunk.
        group_size: G.
        branch_length: chunks after which the branches start from one state again.
    """

    gamma: Annotated[float, within("(0, 1]")] = 0.995
    gae_lambda: Share = 0.95
    group_size: Annotated[int, between(2, 1024)] = 4
    branch_length: Annotated[int, between(1, 1024)] = 8

    def __call__(self, experience: Experience) -> tuple[Array, Array]:
        """See :class:`AdvantageStrategy`; G neighbours in N are a group."""
        estimates = GAE(self.gamma, self.gae_lambda)
        _, returns = estimates(experience)
        is_last = np.arange(1, len(returns) + 1) % self.branch_length == 0
        alone, _ = estimates(dataclasses.replace(experience, ended=experience.ended | is_last[:, None]))
        groups = alone.reshape(len(alone), -1, self.group_size)
        others = (groups.sum(2, keepdims=True) - groups) / (self.group_size - 1)
        return (groups - others).reshape(alone.shape), returns
