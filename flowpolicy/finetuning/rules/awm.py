"""Advantage-weighted matching (Xue et al. 2025; McAllister et al. 2025, "Flow Matching Policy Gradients")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from flowpolicy.finetuning.rules.forward import ForwardRule, executed_sum
from flowpolicy.finetuning.rules.rule import Minibatch
from flowpolicy.flow.objective import Metrics
from flowpolicy.ranges import PositiveFloat, at_least


@dataclass(frozen=True)
class AWM(ForwardRule):
    """PPO's clipped surrogate with the flow-matching loss in place of the log-likelihood.

    With l = -|v - u|^2, a mean over a chunk's draws, the ratio is exp(l - l_old).

    Attributes:
        clip_range: the ratio's allowed distance from 1.
        largest_ratio: beyond which a bad chunk has no gradient either. PPO's clip leaves it one that grows
            with the ratio, and a few chunks that the policy has come upon by chance outweigh all others
            (Ye et al. 2020, the dual clip).
    """

    name: ClassVar[str] = "awm"
    clip_range: PositiveFloat = 0.05
    largest_ratio: Annotated[float, at_least(1.0, "at least 1")] = 3.0

    def policy_loss(self, velocity: Tensor, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """-E[min(r A, clip(r) A)], r up to ``largest_ratio``."""
        old, new = (
            -executed_sum((each - batch.kept["u"]) ** 2, batch).mean(1)
            for each in (batch.kept["old"], velocity)
        )
        ratio = (new - old).clamp(max=math.log(self.largest_ratio)).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        surrogate = torch.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
        clip_fraction = ((ratio.detach() - 1).abs() > self.clip_range).float().mean()
        return -surrogate, {"train/clip_fraction": clip_fraction}
