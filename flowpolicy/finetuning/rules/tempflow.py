"""TempFlow (He et al. 2025): noise at one step of the chain, and noise-aware weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowpolicy.finetuning.chain import NoisyFlow
from flowpolicy.finetuning.rules.ppo import PPO
from flowpolicy.finetuning.rules.rule import Minibatch
from flowpolicy.flow.objective import Metrics


@dataclass(frozen=True)
class TempFlow(PPO):
    """PPO on the one transition of a chain that had noise, to which its advantage is due.

    Which of the K it is, is drawn for each chunk; the others are the flow's own. A chunk's loss has the
    weight sigma_k / mean_j sigma_j, so that a transition counts as its noise lets it explore. The advantage
    comes from the critic, where the published method compares a group of branches.
    """

    name: ClassVar[str] = "tempflow"
    branches = True

    def loss(self, flow: NoisyFlow, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """As :meth:`PPO.loss`, of that transition."""
        noisy = (batch.x[:, 1:] != batch.mean).any(3, keepdim=True).any(2, keepdim=True)  # (B, K, 1, 1)
        level = batch.std.mean((2, 3))
        weight = (level * noisy[..., 0, 0]).sum(1) / level.mean(1)
        alone = dataclasses.replace(batch, mask=batch.mask * noisy, advantage=batch.advantage * weight)
        return super().loss(flow, alone)
