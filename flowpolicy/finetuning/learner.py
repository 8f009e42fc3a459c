"""The steps of policy and critic on minibatches, and when the policy has moved far enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from flowpolicy.errors import FlowPolicyError
from flowpolicy.finetuning.actor_critic import FlowActorCritic
from flowpolicy.finetuning.regularization import Regularizer
from flowpolicy.finetuning.update import Minibatch, UpdateRule
from flowpolicy.runs.distributed import Processes

TOKENS_AT_ONCE = 2048
"""Noisy action tokens in one pass of an update on a CPU; the gradient is that of the whole minibatch."""
OVERSHOOT = 2.0
"""A policy step found to lie beyond this many times ``target_kl`` is taken back."""
RATE_FACTORS = (0.05, 1.0)
"""Least and largest factor that ``adaptive_rate`` puts on the learning rate."""


class Learner:
    """Optimises the networks of ReinFlow.

    Args:
        networks: flow, noise and critic; changed in place.
        update: the update rule.
        regularizers: further terms of the policy loss.
        target_kl: nats per chunk, beyond which the policy rests; see :class:`ReinFlow`.
        max_grad_norm: gradients are clipped to it.
        processes: this process among many that share gradients.
        generator: source of the regularisers' noise.

    Attributes:
        rate_factor: on the policy's learning rate; see :meth:`adapt_rate`.
    """

    def __init__(
        self,
        networks: FlowActorCritic,
        update: UpdateRule,
        regularizers: Sequence[Regularizer],
        *,
        target_kl: float | None,
        max_grad_norm: float,
        processes: Processes,
        generator: torch.Generator,
    ) -> None:
        self.networks, self.update, self.regularizers = networks, update, regularizers
        self.target_kl, self.max_grad_norm = target_kl, max_grad_norm
        self.processes, self.generator, self.device = processes, generator, generator.device
        self.actor_optimizer = torch.optim.Adam(networks.actor_parameters())
        self.critic_optimizer = torch.optim.Adam(networks.critic.parameters())
        self.rate_factor = 1.0
        self._before_step: list[torch.Tensor] | None = None

    def start_iteration(self, policy_rate: float, critic_rate: float) -> float:
        """Set the learning rates, and forget the last iteration; the policy's rate with its factor."""
        self._before_step = None
        rates = policy_rate * self.rate_factor, critic_rate
        for optimizer, rate in zip((self.actor_optimizer, self.critic_optimizer), rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rates[0]

    def overshot(self, metrics: dict[str, float]) -> bool:
        """NaN, which an overflowing ratio gives, is the farthest of all."""
        return self.target_kl is not None and not metrics["train/kl"] <= OVERSHOOT * self.target_kl

    def adapt_rate(self, share: float, *, stopped: bool, overshot: bool) -> None:
        """A rate whose few steps reach the KL bound wastes data; one that never reaches it wastes time."""
        if overshot or (stopped and share < 0.25):
            change = 0.7 if overshot or share < 0.1 else 0.85
            self.rate_factor = max(self.rate_factor * change, RATE_FACTORS[0])
        elif not stopped:
            self.rate_factor = min(self.rate_factor * 1.1, RATE_FACTORS[1])

    def critic_step(self, batch: Minibatch) -> float:
        """One step of the critic towards the returns; its loss."""
        critic = self.networks.critic
        loss = ((self.networks.values(batch.observation) - batch.returns) ** 2).mean()
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.processes.average_gradients(critic.parameters())
        nn.utils.clip_grad_norm_(critic.parameters(), self.max_grad_norm)
        self.critic_optimizer.step()
        return float(loss.detach())

    def _gradient(self, batch: Minibatch) -> dict[str, float]:
        """Add the gradient of the update rule's loss to the parameters, a part of the minibatch at a time."""
        rows_at_once = len(batch)
        if self.device.type == "cpu":  # activations that stay in a core's cache: a tenth faster
            tokens = batch.mean.shape[1] * batch.mean.shape[2]
            rows_at_once = max(1, TOKENS_AT_ONCE // tokens)
        metrics: dict[str, float] = {}
        for rows in torch.split(torch.arange(len(batch), device=self.device), rows_at_once):
            loss, found = self.update.loss(self.networks.flow, batch[rows])
            share = len(rows) / len(batch)
            if torch.is_grad_enabled():
                (share * loss).backward()  # type: ignore[no-untyped-call]
            for name, value in {"train/loss": loss, **found}.items():
                metrics[name] = metrics.get(name, 0.0) + share * float(value.detach())
        return metrics

    @torch.no_grad()
    def check(self, batch: Minibatch) -> tuple[dict[str, float], bool]:
        """Metrics without a step, and whether the policy may move on."""
        metrics = self._gradient(batch)
        return metrics, self._within_bounds(metrics)

    def _within_bounds(self, metrics: dict[str, float]) -> bool:
        """Whether the policy may move on; takes an overshooting step back."""
        metrics["train/kl"] = self.processes.total(metrics["train/kl"]) / self.processes.count
        if self.overshot(metrics) and self._before_step is not None:
            with torch.no_grad():
                for parameter, before in zip(
                    self.networks.actor_parameters(), self._before_step, strict=True
                ):
                    parameter.copy_(before)
        return self.target_kl is None or metrics["train/kl"] <= self.target_kl

    def policy_step(self, batch: Minibatch) -> tuple[dict[str, float], bool]:
        """One step of flow and noise; none, and False, where they have moved too far already."""
        flow, parameters = self.networks.flow, self.networks.actor_parameters()
        self.actor_optimizer.zero_grad(set_to_none=True)
        metrics = self._gradient(batch)
        if not self._within_bounds(metrics):
            return metrics, False
        for term in self.regularizers:
            value = term.loss(flow, batch, self.generator)
            (term.weight * value).backward()  # type: ignore[no-untyped-call]
            metrics[f"train/{term.name}"] = float(value.detach())
            metrics["train/loss"] += term.weight * float(value.detach())
        finite = self.processes.gather(float(math.isfinite(metrics["train/loss"])))
        if not all(flag for (flag,) in finite):  # on any process: all of them stop
            raise FlowPolicyError("The policy loss is not finite; lower learning_rate.")
        self.processes.average_gradients(parameters)
        metrics["train/gradient_norm"] = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        self._before_step = [parameter.detach().clone() for parameter in parameters]
        self.actor_optimizer.step()
        return metrics, True
