"""EXPO (Dong et al. 2025): the flow's chunks, small learnt edits of them, and a critic that chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from flowpolicy.finetuning.offpolicy.algorithms.algorithm import FlowProposals, Optimizers
from flowpolicy.finetuning.offpolicy.entropy import Temperature, descend
from flowpolicy.finetuning.offpolicy.networks import SteeredActor
from flowpolicy.finetuning.offpolicy.replay import Transitions
from flowpolicy.flow.objective import Metrics
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.steering import Widths
from flowpolicy.ranges import PositiveFloat, PositiveInt, positive_to
from flowpolicy.settings import require


@dataclass(frozen=True)
class EXPO(FlowProposals):
    """Acts by the best of c_1 ... c_N ~ flow(o) and of c_i + e_i, e_i ~ edits(o, c_i), |e_i| <= ``bound``.

    The edits are trained by SAC, max E[Q(o, c + e) - alpha / n log p(e | o, c)], with c from the flow; V'(o')
    is the largest min_m Q'_m(o', .) of chunks and edited chunks.

    Attributes:
        bound: of an edit in normalised units.
        edit_hidden: widths of the edit policy.
        edit_every: critic updates between two steps of the edit policy.
        entropy: that the temperature alpha aims at, in nats for each number of an edit, in units of the bound
            (0.69 is uniform).
        temperature: alpha at first.
        samples_edits: edits keep their noise where the policy is deployed, as while it learns. Its source is
            the x_0 of another proposal, so it takes two.
    """

    name: ClassVar[str] = "expo"
    bound: Annotated[float, positive_to(10)] = 0.05
    edit_hidden: Widths = (256, 256)
    edit_every: PositiveInt = 2
    entropy: float = -0.5
    temperature: PositiveFloat = 0.01
    samples_edits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        is_alone = self.samples_edits and self.proposals < 2
        require(not is_alone, "algorithm.proposals", self.proposals, "2 or more with samples_edits")

    def steering(self, members: int, hidden: tuple[int, ...]) -> dict[str, Any]:
        """See :class:`Algorithm`."""
        return {
            "name": "edited", "proposals": self.proposals, "members": members, "hidden": list(hidden),
            "bound": self.bound, "edit_hidden": list(self.edit_hidden),
            **({"samples_edits": True} if self.samples_edits else {}),  # which older readers do not know
        }  # fmt: skip

    def extra(self, policy: FlowPolicy, members: int, hidden: tuple[int, ...]) -> nn.ModuleDict:
        """And alpha."""
        extra = super().extra(policy, members, hidden)
        extra["temperature"] = Temperature(self.temperature)
        return extra

    def parameters(self, networks: SteeredActor) -> dict[str, tuple[list[nn.Parameter], float | None]]:
        """And those of the edits and of alpha."""
        steering = networks.steering
        edits = [*steering.edits.parameters(), *steering.features.parameters()]
        temperature = [*networks.extra["temperature"].parameters()]
        return {**super().parameters(networks), "edits": (edits, None), "temperature": (temperature, None)}

    def act(
        self, networks: SteeredActor, observation: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Algorithm`."""
        chunks, known = self.proposed(networks, observation, generator)
        return networks.steering.best(
            observation, self._with_edits(networks, observation, chunks, generator)
        ), known

    def next_values(
        self, networks: SteeredActor, batch: Transitions, members: Tensor, generator: torch.Generator
    ) -> Tensor:
        """See the class."""
        observation = batch.next_observation
        chunks = self._with_edits(networks, observation, batch.known["chunks"], generator)
        values: Tensor = networks.extra["target"](observation, chunks, members)
        return values.amin(0).amax(1)

    def improve(
        self,
        networks: SteeredActor,
        batch: Transitions,
        optimizers: Optimizers,
        generator: torch.Generator,
        update: int,
        is_online: bool,
    ) -> Metrics:
        """A step of the edits, at the next observations, whose chunks are known, and of alpha."""
        metrics = super().improve(networks, batch, optimizers, generator, update, is_online)
        if not is_online or update % self.edit_every:
            return metrics
        steering, observation, known = networks.steering, batch.next_observation, batch.known["chunks"]
        chosen = torch.randint(known.shape[1], (len(known),), generator=generator, device=known.device)
        chunks = known[torch.arange(len(known), device=known.device), chosen][:, None]
        edits, log_prob = steering.edits.sample(steering.inputs(observation, chunks), generator)
        value = steering.critic(observation, steering.edited(chunks, edits)).mean(0)
        temperature: Any = networks.extra["temperature"]
        log_prob = log_prob / edits[0, 0].numel()
        loss = (temperature().detach() * log_prob - value).mean()
        descend(optimizers["edits"], loss)
        temperature.step(optimizers["temperature"], log_prob.detach(), self.entropy)
        return {
            **metrics, "train/edit_loss": loss.detach(), "train/temperature": temperature().detach(),
            "train/edit_entropy": -log_prob.detach().mean(),
            "train/edit_size": edits.detach().abs().mean(),
        }  # fmt: skip

    def _with_edits(
        self,
        networks: SteeredActor,
        observation: Mapping[str, Tensor],
        chunks: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Chunks ``(B, M, T, A)``, and after them as many that are edited."""
        steering = networks.steering
        edits, _ = steering.edits.sample(steering.inputs(observation, chunks), generator)
        return torch.cat([chunks, steering.edited(chunks, edits)], dim=1)
