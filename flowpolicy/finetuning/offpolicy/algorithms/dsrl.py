"""DSRL (Wagenmaker et al. 2025): an actor chooses the x_0 of a flow that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from flowpolicy.finetuning.offpolicy.algorithms.algorithm import Algorithm, Optimizers
from flowpolicy.finetuning.offpolicy.entropy import Temperature, descend
from flowpolicy.finetuning.offpolicy.networks import SteeredActor
from flowpolicy.finetuning.offpolicy.replay import Transitions
from flowpolicy.flow.objective import Metrics
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.steering import ChunkCritic, Widths
from flowpolicy.ranges import PositiveFloat, PositiveInt, between, positive_to


@dataclass(frozen=True)
class DSRL(Algorithm):
    """Acts by flow(o, w) with w ~ actor(o), |w| <= ``bound``; noise aliasing (their algorithm 2).

    Q(o, c) is learnt of chunks, so that demonstrations, which have no w, count. Another critic is fitted to
    it where the flow's chunk is known, W(o, w) = Q'(o, flow(o, w)), and the actor is trained on that by SAC,
    max E[W(o, w) - alpha / n log p(w | o)]. The published backup Q'(o', flow(o', w')) is taken as
    min_m W_m(o', w'), which no update has to evaluate the flow for.

    Attributes:
        bound: of a number of w.
        proposals: pairs of w and its chunk that are known of each observation: the actor's, and draws from
            N(0, I) within the bound.
        fitted: of those, drawn anew for each update, the ones that W is fitted on.
        actor_hidden: widths of the actor.
        actor_every: critic updates between two steps of the actor.
        entropy: that the temperature alpha aims at, in nats for each number of w, in units of the bound
            (0.69 is uniform).
        temperature: alpha at first.
    """

    name: ClassVar[str] = "dsrl"
    bound: Annotated[float, positive_to(10)] = 1.5
    proposals: Annotated[int, between(2, 1024)] = 4
    fitted: PositiveInt = 2
    actor_hidden: Widths = (256, 256)
    actor_every: PositiveInt = 2
    entropy: float = 0.0
    temperature: PositiveFloat = 0.01

    def steering(self, members: int, hidden: tuple[int, ...]) -> dict[str, Any]:
        """See :class:`Algorithm`."""
        return {"name": "latent", "bound": self.bound, "hidden": list(self.actor_hidden)}

    def extra(self, policy: FlowPolicy, members: int, hidden: tuple[int, ...]) -> nn.ModuleDict:
        """Q, its slow copy, W, and alpha."""
        sizes = policy.network, policy.spec, members, hidden
        critic, target = ChunkCritic(*sizes), ChunkCritic(*sizes).requires_grad_(False)
        target.load_state_dict(critic.state_dict())
        latent = ChunkCritic(*sizes, horizon=policy.spec.action_horizon)
        temperature = Temperature(self.temperature)
        return nn.ModuleDict(
            {"critic": critic, "target": target, "latent": latent, "temperature": temperature}
        )

    def critics(self, networks: SteeredActor) -> tuple[ChunkCritic, ...]:
        """See :class:`Algorithm`."""
        found: tuple[Any, ...] = tuple(networks.extra[name] for name in ("critic", "target", "latent"))
        return found

    def parameters(self, networks: SteeredActor) -> dict[str, tuple[list[nn.Parameter], float | None]]:
        """See :class:`Algorithm`."""
        steering = networks.steering
        return {
            "latent": ([*networks.extra["latent"].parameters()], None),
            "actor": ([*steering.actor.parameters(), *steering.features.parameters()], None),
            "temperature": ([*networks.extra["temperature"].parameters()], None),
        }

    def act(
        self, networks: SteeredActor, observation: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Algorithm`."""
        steering = networks.steering
        own, _ = steering.actor.sample(steering.features(observation), generator)
        drawn = networks.draw(observation, self.proposals - 1, generator).clamp(-self.bound, self.bound)
        latents = torch.cat([own[:, None], drawn], dim=1)
        chunks = networks.flow_chunks(observation, latents)
        return chunks[:, 0], {"latents": latents, "chunks": chunks}

    def next_values(
        self, networks: SteeredActor, batch: Transitions, members: Tensor, generator: torch.Generator
    ) -> Tensor:
        """See the class."""
        steering, observation = networks.steering, batch.next_observation
        latents, _ = steering.actor.sample(steering.features(observation), generator)
        values: Tensor = networks.extra["latent"](observation, latents[:, None], members)
        return values.amin(0)[:, 0]

    def improve(
        self,
        networks: SteeredActor,
        batch: Transitions,
        optimizers: Optimizers,
        generator: torch.Generator,
        update: int,
        is_online: bool,
    ) -> Metrics:
        """A step of W, at the next observations, whose pairs are known; of the actor and of alpha."""
        observation, latents = batch.next_observation, batch.known["latents"]
        latent, temperature = networks.extra["latent"], networks.extra["temperature"]
        drawn = torch.randperm(latents.shape[1], generator=generator, device=latents.device)[: self.fitted]
        latents = latents[:, drawn]
        with torch.no_grad():
            wanted = networks.extra["target"](observation, batch.known["chunks"][:, drawn])
        error = ((latent(observation, latents) - wanted) ** 2).mean((1, 2)).sum()
        descend(optimizers["latent"], error)
        metrics = {"train/latent_loss": error.detach() / len(wanted)}
        if update % self.actor_every:
            return metrics
        steering = networks.steering
        own, log_prob = steering.actor.sample(steering.features(observation), generator)
        value = latent(observation, own[:, None]).mean(0)[:, 0]
        log_prob = log_prob / own[0].numel()
        loss = (temperature().detach() * log_prob - value).mean()
        descend(optimizers["actor"], loss)
        temperature.step(optimizers["temperature"], log_prob.detach(), self.entropy)  # type: ignore[operator]
        return {
            **metrics, "train/actor_loss": loss.detach(), "train/temperature": temperature().detach(),
            "train/actor_entropy": -log_prob.detach().mean(), "train/latent_size": own.detach().abs().mean(),
        }  # fmt: skip
