"""PPO on the exact likelihood of the chain (ReinFlow, Zhang et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from flowpolicy.finetuning.chain import NoisyFlow, entropy, kl_divergence, log_prob
from flowpolicy.finetuning.rules.rule import Minibatch, UpdateRule
from flowpolicy.flow.objective import Metrics
from flowpolicy.ranges import NonNegativeFloat, PositiveFloat, one_of

REDUCTIONS = ("joint", "per_step", "mean")


@dataclass(frozen=True)
class PPO(UpdateRule):
    """Clipped policy gradient (Schulman et al. 2017) on the exact likelihood of the chain.

    Attributes:
        clip_range: the ratio's allowed distance from 1, in units of the reduction.
        reduction: how the log-ratios of a chain's transitions become ratios. ``joint`` sums them, which is
            the likelihood ratio of the chain; ``per_step`` clips the ratio of each transition by itself;
            ``mean`` averages over transitions, actions and dimensions, a geometric mean and no likelihood
            ratio, as Zhang et al. published.
        entropy_coefficient: weight of the mean entropy of a transition's element, in nats; elements that do
            not count have none.
    """

    name: ClassVar[str] = "ppo"
    clip_range: PositiveFloat = 0.2
    reduction: Annotated[str, one_of(REDUCTIONS)] = "joint"
    entropy_coefficient: NonNegativeFloat = 0.0

    def loss(self, flow: NoisyFlow, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """-E[min(r A, clip(r) A)] minus the entropy bonus."""
        mean, std = flow(batch.observation, batch.x)
        difference = log_prob(batch.x, mean, std) - log_prob(batch.x, batch.mean, batch.std)
        ratio = self._log_ratio(difference * batch.mask, batch.mask).exp()
        advantage = batch.advantage[:, None]
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage).mean()
        bonus = (entropy(std) * batch.mask).mean()
        with torch.no_grad():
            nats = kl_divergence(batch.mean, batch.std, mean, std) * batch.mask
            metrics = {
                "train/policy_loss": -surrogate,
                "train/kl": nats.sum((1, 2, 3)).mean(),
                "train/clip_fraction": ((ratio - 1).abs() > self.clip_range).float().mean(),
                "train/ratio_spread": (ratio - 1).abs().mean(),
                "train/entropy": bonus,
                "train/noise_std": std.mean(),
                "train/mean_clamped": (mean[:, -1].abs() >= flow.clip).float().mean(),
            }
        return -surrogate - self.entropy_coefficient * bonus, metrics

    def _log_ratio(self, masked: Tensor, mask: Tensor) -> Tensor:
        """``(B, K, T, A)`` to ``(B, 1)``, or ``(B, K)`` where each transition has a ratio of its own."""
        if self.reduction == "per_step":
            return masked.sum((2, 3))
        total = masked.sum((1, 2, 3))[:, None]
        if self.reduction == "joint":
            return total
        count = mask.sum((1, 2, 3)) * masked.shape[-1]
        return total / count.clamp(min=1)[:, None]
