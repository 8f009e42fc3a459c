"""What an off-policy algorithm is asked for: how it acts, what the next chunk is worth, what it improves."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from flowpolicy.data.sampling import Batch
from flowpolicy.finetuning.offpolicy.networks import SteeredActor
from flowpolicy.finetuning.offpolicy.replay import Transitions
from flowpolicy.flow.objective import Metrics
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.steering import ChunkCritic
from flowpolicy.ranges import NonNegativeFloat, PositiveInt, between
from flowpolicy.settings import Settings

Optimizers = Mapping[str, torch.optim.Optimizer]


class Algorithm(Settings, ABC, prefix="algorithm"):
    """What is learnt from a replay of chunks, around a flow.

    All algorithms share the critic's update: with y = sum_i gamma^i r_i + gamma^n V'(o'), V' being
    :meth:`next_values`, each member of the ensemble moves towards y.

    Attributes:
        name: as configurations say it.
    """

    name: ClassVar[str]

    @property
    def flow_changes(self) -> bool:
        """Whether what is known of an observation is of the flow as it was."""
        return False

    @abstractmethod
    def steering(self, members: int, hidden: tuple[int, ...]) -> dict[str, Any]:
        """``name`` and settings of what is deployed around the flow, for a critic of these sizes."""

    def extra(self, policy: FlowPolicy, members: int, hidden: tuple[int, ...]) -> nn.ModuleDict:
        """Networks that are not deployed: at least the critic's slow copy, ``target``."""
        steering: Any = policy.steering
        return nn.ModuleDict({"target": copy.deepcopy(steering.critic).requires_grad_(False)})

    def critics(self, networks: SteeredActor) -> tuple[ChunkCritic, ...]:
        """Q(o, chunk), its slow copy, and whatever else speaks in its unit."""
        found: tuple[Any, ...] = networks.steering.critic, networks.extra["target"]
        return found

    def parameters(self, networks: SteeredActor) -> dict[str, tuple[list[nn.Parameter], float | None]]:
        """What :meth:`improve` has an optimiser for, by name, and the learning rate or None."""
        return {}

    @abstractmethod
    def act(
        self, networks: SteeredActor, observation: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Chunks ``(B, T, A)`` to execute while learning, and what is kept of the observations."""

    def known(
        self, networks: SteeredActor, observation: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """What is kept of observations in which nothing is done."""
        return self.act(networks, observation, generator)[1]

    @abstractmethod
    def next_values(
        self, networks: SteeredActor, batch: Transitions, members: Tensor, generator: torch.Generator
    ) -> Tensor:
        """V'(o') ``(B,)`` of the batch's next observations, by the slow critic's ``members``."""

    def improve(
        self,
        networks: SteeredActor,
        batch: Transitions,
        optimizers: Optimizers,
        generator: torch.Generator,
        update: int,
        is_online: bool,
    ) -> Metrics:
        """Learn whatever is not the critic.

        Args:
            networks: changed in place.
            batch: what the critic has just learnt from.
            optimizers: those that :meth:`parameters` asks for, by name.
            generator: source of everything random.
            update: number of the critic's update, from 0.
            is_online: the batch has executed chunks too; not only demonstrations, of which a critic has no
                means to find that an action is worse than it thinks.
        """
        return {}


@dataclass(frozen=True)
class FlowProposals(Algorithm):
    """An algorithm that chooses among chunks of the flow.

    Attributes:
        proposals: chunks from the flow in each observation, N.
        target_proposals: of those, the ones that the value of the next observation is taken over.
        flow_learning_rate: of the flow, which imitates the batches; 0 leaves it as it was pretrained.
        imitation_every: critic updates between two steps of the flow.
        imitates_successes: the flow imitates demonstrations and episodes that succeeded, and nothing else.
    """

    proposals: Annotated[int, between(1, 1024)] = 8
    target_proposals: Annotated[int, between(1, 1024)] = 4
    flow_learning_rate: NonNegativeFloat = 0.0
    imitation_every: PositiveInt = 4
    imitates_successes: bool = False

    @property
    def flow_changes(self) -> bool:
        """Whether the flow imitates."""
        return self.flow_learning_rate > 0

    def parameters(self, networks: SteeredActor) -> dict[str, tuple[list[nn.Parameter], float | None]]:
        """The flow's, where it learns."""
        if not self.flow_changes:
            return {}
        flow = [each for each in networks.flow_policy.network.parameters() if each.requires_grad]
        return {"flow": (flow, self.flow_learning_rate)}

    def known(
        self, networks: SteeredActor, observation: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See :class:`Algorithm`."""
        noise = networks.draw(observation, min(self.proposals, self.target_proposals), generator)
        return {"chunks": networks.flow_chunks(observation, noise)}

    def proposed(
        self, networks: SteeredActor, observation: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Chunks ``(B, N, T, A)`` of the flow, and those that are kept: drawn once for each observation,
        for all targets to come.
        """
        noise = networks.draw(observation, self.proposals, generator)
        chunks = networks.flow_chunks(observation, noise)
        return chunks, {"chunks": chunks[:, : self.target_proposals]}

    def improve(
        self,
        networks: SteeredActor,
        batch: Transitions,
        optimizers: Optimizers,
        generator: torch.Generator,
        update: int,
        is_online: bool,
    ) -> Metrics:
        """A step of the flow on executed and demonstrated chunks."""
        if not (self.flow_changes and is_online) or update % self.imitation_every:
            return {}
        policy, device = networks.flow_policy, batch.chunk.device
        rows = batch.succeeded.bool() if self.imitates_successes else torch.ones_like(batch.executed).bool()
        if not rows.any():
            return {}
        chunk = batch.chunk[rows]
        mask = torch.arange(chunk.shape[1], device=device) < batch.executed[rows][:, None]
        draws = policy.objective.draw(tuple(chunk.shape), generator, policy.device)  # type: ignore[arg-type]
        imitated = Batch({key: value[rows] for key, value in batch.observation.items()}, chunk, mask)
        loss, _ = policy.objective.loss(policy.network, imitated, draws)
        optimizer = optimizers["flow"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(policy.network.parameters(), 1.0)
        optimizer.step()
        return {"train/imitation_loss": loss.detach()}
