"""Updates of critic and algorithm from batches of a replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowpolicy.errors import FlowPolicyError
from flowpolicy.files.storage import load_optimizer, optimizer_tensors, under
from flowpolicy.finetuning.advantages import ReturnScale
from flowpolicy.finetuning.offpolicy.algorithms import Algorithm
from flowpolicy.finetuning.offpolicy.config import OffPolicySettings
from flowpolicy.finetuning.offpolicy.networks import SteeredActor
from flowpolicy.finetuning.offpolicy.replay import Transitions
from flowpolicy.runs.device import has_fused_adam

OPTIMIZERS = "optimizers"


class OffPolicyLearner:
    """Optimises the networks of an off-policy algorithm.

    The critic's unit is the return scale. Where that changes, its last layer is multiplied so that what it
    says stays the same in units of reward (van Hasselt et al. 2016).

    Args:
        networks: changed in place.
        algorithm: what is learnt besides the critic.
        settings: shared by all algorithms.
        num_envs: environments.
        generator: source of everything random.

    Attributes:
        scale: by which rewards are divided.
        updates: of the critic.
        lowest: least reward of a step so far.
        highest: largest.
    """

    def __init__(
        self,
        networks: SteeredActor,
        algorithm: Algorithm,
        settings: OffPolicySettings,
        *,
        num_envs: int,
        generator: torch.Generator,
    ) -> None:
        self.networks, self.algorithm, self.settings, self.generator = (
            networks,
            algorithm,
            settings,
            generator,
        )
        self.critics = algorithm.critics(networks)
        self.critic, self.target = self.critics[:2]
        rate, fused = settings.learning_rate, has_fused_adam(generator.device)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "critic": torch.optim.Adam(self.critic.parameters(), lr=rate, fused=fused)
        }
        for name, (parameters, own) in algorithm.parameters(networks).items():
            self.optimizers[name] = torch.optim.Adam(parameters, lr=rate if own is None else own, fused=fused)
        self.scale = ReturnScale(num_envs, settings.gamma)
        self._unit = 1.0
        self.updates = 0
        self.lowest = self.highest = 0.0

    def observe(self, moments: tuple[float, ...], rewards: Any) -> None:
        """Take account of further returns, as :meth:`ReturnScale.run` gives them, and of steps' rewards."""
        self.scale.merge(*moments)
        self.lowest = min(self.lowest, float(np.min(rewards, initial=0.0)))
        self.highest = max(self.highest, float(np.max(rewards, initial=0.0)))
        factor, self._unit = self._unit / self.scale.value, self.scale.value
        if factor != 1.0 and self.updates:
            for each in self.critics:
                each.ensemble.rescale(factor)

    def train(
        self, batches: Callable[[], Transitions], count: int, *, is_online: bool = True
    ) -> dict[str, float]:
        """``count`` updates.

        Args:
            batches: makes one.
            count: how many.
            is_online: see :meth:`Algorithm.improve`.

        Returns:
            Means of the metrics, ``train/...``.

        Raises:
            FlowPolicyError: a loss is not finite.
        """
        found: dict[str, list[Tensor]] = {}
        for _ in range(count):
            batch = batches()
            metrics = self.critic_step(batch)
            metrics |= self.algorithm.improve(
                self.networks, batch, self.optimizers, self.generator, self.updates, is_online
            )
            self.updates += 1
            for name, value in metrics.items():
                found.setdefault(name, []).append(value)
        means = {name: float(torch.stack(values).mean()) for name, values in found.items()}
        if not all(np.isfinite(value) for value in means.values()):
            raise FlowPolicyError("A loss is not finite; lower offpolicy.learning_rate.")
        return {**means, "train/return_scale": self.scale.value}

    def critic_step(self, batch: Transitions) -> dict[str, Tensor]:
        """One step of every member towards the targets, and one of the slow copy after it."""
        targets = self.targets(batch)
        values = self.critic(batch.observation, batch.chunk[:, None])[..., 0]
        loss = ((values - targets) ** 2).mean(1).sum()  # of each member by itself
        optimizer = self.optimizers["critic"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        self.follow()
        return {
            "train/critic_loss": loss.detach() / len(values),
            "train/value": values.detach().mean(),
            "train/value_spread": values.detach().std(0).mean(),
        }

    @torch.no_grad()
    def targets(self, batch: Transitions) -> Tensor:
        """y = R + gamma^n V'(o') ``(B,)`` in scaled units, within what the rewards so far allow."""
        members = torch.randperm(self.settings.members, generator=self.generator, device=batch.reward.device)[
            : self.settings.target_members
        ]
        values = self.algorithm.next_values(self.networks, batch, members, self.generator)
        targets = batch.reward / self.scale.value + batch.discount * values
        if self.settings.gamma < 1:
            longest = 1 / ((1 - self.settings.gamma) * self.scale.value)
            targets = targets.clamp(self.lowest * longest, self.highest * longest)
        return targets

    @torch.no_grad()
    def follow(self) -> None:
        """The slow copy takes over ``tau`` of the critic."""
        slow, fast = (list[Tensor](each.parameters()) for each in (self.target, self.critic))
        torch._foreach_lerp_(slow, fast, self.settings.tau)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that learning goes on from: tensors by name, and numbers."""
        tensors = {f"networks.{name}": value for name, value in self.networks.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors.update(optimizer_tensors(optimizer, f"{OPTIMIZERS}.{name}"))
        tensors["generator"] = self.generator.get_state()
        return tensors, {
            "updates": self.updates, "return_scale": self.scale.state(),
            "rewards": (self.lowest, self.highest),
        }  # fmt: skip

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], fresh_seed: int) -> None:
        """Take over a :meth:`state`; random numbers of another kind of device go on from ``fresh_seed``."""
        self.networks.load_state_dict(under(tensors, "networks"))
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, under(tensors, f"{OPTIMIZERS}.{name}"))
        state = tensors["generator"]
        if len(state) == len(self.generator.get_state()):
            self.generator.set_state(state)
        else:
            self.generator.manual_seed(fresh_seed)
        self.updates = numbers["updates"]
        self.scale.merge(*numbers["return_scale"])
        self._unit = self.scale.value
        self.lowest, self.highest = numbers["rewards"]
