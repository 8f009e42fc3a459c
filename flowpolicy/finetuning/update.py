"""Update rules: how a policy's chains and their advantages become a loss.

One interface, so that another rule (advantage-weighted flow matching, a group-relative one) is one class here
and needs no loop of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowpolicy.finetuning.chain import NoisyFlow, entropy, kl_divergence, log_prob
from flowpolicy.flow.objective import Metrics
from flowpolicy.settings import build, choose, require

REDUCTIONS = ("joint", "per_step", "mean")


@dataclass(frozen=True)
class Minibatch:
    """B chunks of an iteration, each with the whole chain that made it; normalised units.

    Attributes:
        observation: key -> ``(B, T_o, *shape)``.
        x: chains ``(B, K+1, T, A)``.
        mean: of the transitions when they were sampled, ``(B, K, T, A)``.
        std: likewise.
        mask: elements that count, ``(B, K, T, 1)``; see :func:`~flowpolicy.finetuning.chain.transition_mask`.
        advantage: ``(B,)``, normalised over the iteration.
        returns: targets of the critic, ``(B,)``.
    """

    observation: dict[str, Tensor]
    x: Tensor
    mean: Tensor
    std: Tensor
    mask: Tensor
    advantage: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor) -> Minibatch:
        observation = {key: value[rows] for key, value in self.observation.items()}
        return Minibatch(
            observation, self.x[rows], self.mean[rows], self.std[rows], self.mask[rows],
            self.advantage[rows], self.returns[rows],
        )  # fmt: skip


class UpdateRule(Protocol):
    """A policy loss on a minibatch."""

    name: ClassVar[str]

    def loss(self, flow: NoisyFlow, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """Scalar loss and metrics, each a mean over the chunks, so that parts of a minibatch may be averaged.

        The metric ``train/kl``, in nats a chunk, stops an iteration's updates.
        """
        ...


@dataclass(frozen=True)
class PPO:
    """Clipped policy gradient (Schulman et al. 2017) on the exact likelihood of the chain.

    Attributes:
        clip_range: the ratio's allowed distance from 1, in units of the reduction.
        reduction: how the log-ratios of a chain's transitions become ratios. ``joint`` sums them, which is
            the likelihood ratio of the chain; ``per_step`` clips the ratio of each transition by itself;
            ``mean`` averages over transitions, tokens and dimensions, a geometric mean and no likelihood
            ratio, as Zhang et al. published.
        entropy_coefficient: weight of the mean entropy of a transition's element, in nats; elements that do
            not count have none.
    """

    name: ClassVar[str] = "ppo"
    clip_range: float = 0.2
    reduction: str = "joint"
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        require(self.clip_range > 0, "update.clip_range", self.clip_range, "positive")
        require(
            self.reduction in REDUCTIONS,
            "update.reduction",
            self.reduction,
            f"one of {', '.join(REDUCTIONS)}",
        )
        require(
            self.entropy_coefficient >= 0,
            "update.entropy_coefficient",
            self.entropy_coefficient,
            "0 or more",
        )

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


UPDATE_RULES: dict[str, type[UpdateRule]] = {PPO.name: PPO}


def build_update_rule(settings: Mapping[str, Any]) -> UpdateRule:
    """The rule that ``settings["name"]`` names, with the other settings.

    Raises:
        ConfigError: an unknown name, an unknown setting, or one out of range.
    """
    rule = choose(UPDATE_RULES, settings.get("name", PPO.name), "update.name")
    return build(rule, {key: value for key, value in settings.items() if key != "name"}, "update")
