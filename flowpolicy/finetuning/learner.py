"""Learning from an iteration's chunks: steps of policy and critic, until the policy has moved enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowpolicy.errors import FlowPolicyError
from flowpolicy.files.storage import load_optimizer, optimizer_tensors, under
from flowpolicy.finetuning.actor_critic import FlowActorCritic
from flowpolicy.finetuning.advantages import (
    LARGEST_ADVANTAGE,
    LEAST_ADVANTAGE,
    AdvantageStrategy,
    ReturnScale,
    RunningMoments,
    moments_of,
    returns_differ,
)
from flowpolicy.finetuning.buffer import ChunkBuffer
from flowpolicy.finetuning.chain import NoisyFlow
from flowpolicy.finetuning.regularization import Regularizer
from flowpolicy.finetuning.rules import Minibatch, UpdateRule
from flowpolicy.runs.device import has_fused_adam
from flowpolicy.runs.distributed import Processes

TOKENS_AT_ONCE = 2048
"""Noisy action tokens in one pass of an update on a CPU; the gradient is that of the whole minibatch."""
PREPARED_AT_ONCE = 512
"""Chunks that an update rule prepares at once."""
OVERSHOOT = 2.0
"""A policy step found to lie beyond this many times ``target_kl`` is taken back."""
RATE_FACTORS = (0.05, 1.0)
"""Least and largest factor that ``adaptive_rate`` puts on the learning rate."""
OPTIMIZERS = ("actor_optimizer", "critic_optimizer")


class Learner:
    """Optimises the networks of ReinFlow.

    Args:
        networks: flow, noise and critic; changed in place.
        update: the update rule.
        regularizers: further terms of the policy loss.
        advantages: makes advantages of rewards and values.
        group_size: of the groups that they compare, 1 without groups.
        num_envs: environments of this process.
        target_kl: how far the policy may move in an iteration; see :class:`ReinFlow`.
        critic_warmup: iterations in which only the critic learns.
        adaptive_rate: see :class:`ReinFlow`.
        max_grad_norm: gradients are clipped to it.
        reference: the pretrained flow, frozen, where the update rule needs it.
        processes: this process among many that share gradients.
        generator: source of everything random.

    Attributes:
        scale: by which rewards are divided.
        rate_factor: on the policy's learning rate; see :meth:`adapt_rate`.
        iteration: iterations done.
        updates: policy steps taken.
    """

    def __init__(
        self,
        networks: FlowActorCritic,
        update: UpdateRule,
        regularizers: Sequence[Regularizer],
        *,
        advantages: AdvantageStrategy,
        group_size: int = 1,
        num_envs: int,
        target_kl: float | None,
        critic_warmup: int,
        adaptive_rate: bool,
        max_grad_norm: float,
        reference: NoisyFlow | None,
        processes: Processes,
        generator: torch.Generator,
    ) -> None:
        self.networks, self.update, self.regularizers = networks, update, regularizers
        self.advantages, self.group_size, self.reference = advantages, group_size, reference
        self.target_kl = None if update.offline else target_kl  # offline the loss alone says how far
        self.max_grad_norm = max_grad_norm
        self.critic_warmup, self.adaptive_rate = critic_warmup, adaptive_rate
        self.processes, self.generator, self.device = processes, generator, generator.device
        fused = has_fused_adam(self.device)
        self.actor_optimizer = torch.optim.Adam(networks.actor_parameters(), fused=fused)
        self.critic_optimizer = torch.optim.Adam(networks.critic.parameters(), fused=fused)
        self.scale = ReturnScale(max(1, num_envs // group_size), advantages.gamma)
        self.rate_factor = 1.0
        self.iteration = self.updates = 0
        self._before_step: list[torch.Tensor] | None = None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that learning goes on from: tensors by name, and numbers."""
        tensors = {f"networks.{name}": value for name, value in self.networks.state_dict().items()}
        for name in OPTIMIZERS:
            tensors.update(optimizer_tensors(getattr(self, name), name))
        tensors["generator"] = self.generator.get_state()
        return tensors, {
            "iteration": self.iteration,
            "updates": self.updates,
            "rate_factor": self.rate_factor,
            "return_scale": self.scale.state(),
        }

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], fresh_seed: int) -> None:
        """Take over a :meth:`state`; the random numbers of another process, or of another kind of device, go
        on from ``fresh_seed``.
        """
        self.networks.load_state_dict(under(tensors, "networks"))
        for name in OPTIMIZERS:
            load_optimizer(getattr(self, name), under(tensors, name))
        state = tensors["generator"]
        if self.processes.rank == 0 and len(state) == len(self.generator.get_state()):
            self.generator.set_state(state)
        else:
            self.generator.manual_seed(fresh_seed)
        self.iteration, self.updates = numbers["iteration"], numbers["updates"]
        self.rate_factor = numbers["rate_factor"]
        self.scale.merge(*numbers["return_scale"])

    def train(
        self,
        buffer: ChunkBuffer,
        after: dict[str, Tensor],
        *,
        policy_rate: float,
        critic_rate: float,
        batch_size: int,
        n_epochs: int,
        policy_waits: bool = False,
    ) -> dict[str, float]:
        """Several epochs over an iteration's chunks: the critic always, the policy until the KL stop.

        Args:
            buffer: the chunks.
            after: normalised observation after the last one.
            policy_rate: learning rate of flow and noise.
            critic_rate: of the critic.
            batch_size: chunks of a minibatch, of all processes.
            n_epochs: passes over the chunks.
            policy_waits: only the critic learns.

        Returns:
            Metrics, ``train/...``.
        """
        for moments in self.processes.gather(*buffer.return_moments(self.scale)):
            self.scale.merge(*moments)
        data = buffer.data(self.networks.values, after, self.scale, self.advantages)
        logged = {"train/explained_variance": buffer.explained_variance}
        advantage, strength = self.normalized(data.advantage)
        logged["train/advantage_strength"] = strength
        logged["train/learning_rate"] = self.start_iteration(strength * policy_rate, critic_rate)
        is_warm = self.update.offline or self.iteration >= self.critic_warmup
        moving = is_warm and not policy_waits and self._returns_differ(buffer)
        data = dataclasses.replace(
            data,
            advantage=advantage,
            executed=self.networks.executed(data.x[:, -1]),
            bounds=self.networks.bounds(),
            group_size=self.group_size,
        )
        if moving:
            data = self._prepared(data)
        losses, found = [], list[dict[str, float]]()
        # Every chunk once an epoch, in minibatches of nearly one size: a small remnant is a noisy step.
        parts, policy_steps = max(1, round(len(data) * self.processes.count / batch_size)), 0
        for _ in range(n_epochs):
            for rows in data.shuffled(parts, self.generator):
                batch = data[rows]
                losses.append(self.critic_step(batch))
                if moving:
                    metrics, moving = self.policy_step(batch)
                    found.append(metrics)
                    policy_steps += moving
        if moving and policy_steps and self.target_kl is not None:  # the last step was not measured yet
            metrics, moving = self.check(batch)
            found.append(metrics)
        policy_steps -= bool(found) and self.overshot(found[-1])  # it was taken back
        if self.adaptive_rate and found:
            share = policy_steps / len(losses)
            self.adapt_rate(share, stopped=not moving, overshot=self.overshot(found[-1]))
        self.networks.follow(self.iteration)
        self.iteration += 1
        self.updates += policy_steps
        return {**logged, **self._means(found, policy_steps, losses)}

    @torch.no_grad()
    def _prepared(self, data: Minibatch) -> Minibatch:
        """With what the update rule keeps of each chunk."""
        flow, parts = self.networks.flow, list[dict[str, Tensor]]()
        for rows in data.parts(PREPARED_AT_ONCE):
            parts.append(self.update.prepare(flow, data[rows], self.reference, self.generator))
        kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return dataclasses.replace(data, kept=kept)

    def _means(self, found: list[dict[str, float]], steps: int, losses: list[float]) -> dict[str, float]:
        means = {
            name: float(np.mean([metrics[name] for metrics in found if name in metrics]))
            for name in (found[0] if found else ())
        }
        means["train/value_loss"] = float(np.mean(losses))
        logged = dict(self.processes.averaged(means))
        if found:
            logged["train/kl_last"] = found[-1]["train/kl"]
        return {**logged, "train/policy_steps": steps, "train/return_scale": self.scale.value}

    def _returns_differ(self, buffer: ChunkBuffer) -> bool:
        """Whether this iteration says of any action, on any process, that it was better than another."""
        lowest, highest, terminated = zip(*self.processes.gather(*buffer.reward_range()), strict=True)
        return returns_differ(min(lowest), max(highest), is_terminated=any(terminated))

    def normalized(self, advantage: Tensor) -> tuple[Tensor, float]:
        """Advantages of zero mean over the iteration's chunks of all processes, and how strong they are.

        The strength, by which the learning rate is multiplied since Adam's steps do not shrink with the
        gradient, is their mean square, each counted up to ``LARGEST_ADVANTAGE``: 1, but less where they are
        below ``LEAST_ADVANTAGE`` of the return scale, or where a few chunks make up their variance.
        """
        overall = self._moments(advantage)
        normalized = (advantage.double() - overall.mean) / max(overall.std, LEAST_ADVANTAGE)
        counted = self._moments(normalized.abs().clamp(max=LARGEST_ADVANTAGE) ** 2)
        return normalized.float(), counted.mean

    def _moments(self, values: Tensor) -> RunningMoments:
        """Over all processes."""
        overall = RunningMoments()
        for moments in self.processes.gather(*moments_of(values.double().cpu().numpy())):
            overall.merge(*moments)
        return overall

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
            _, transitions, actions, _ = batch.mean.shape
            tokens = getattr(self.networks.flow.network, "num_tokens", actions)
            rows_at_once = max(1, TOKENS_AT_ONCE // (transitions * tokens))
        metrics: dict[str, float] = {}
        for rows in batch.parts(rows_at_once):
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
