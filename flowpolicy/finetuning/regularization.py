"""Regularisers that keep a policy near its teacher during fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowpolicy.data.sampling import ChunkSampler
from flowpolicy.finetuning.chain import NoisyFlow
from flowpolicy.finetuning.rules.rule import Minibatch
from flowpolicy.flow.objective import Objective


class Regularizer(Protocol):
    """A term added to the policy loss."""

    @property
    def name(self) -> str:
        """What its metric is called."""

    @property
    def weight(self) -> float:
        """Factor of the loss."""

    def loss(self, flow: NoisyFlow, batch: Minibatch, generator: torch.Generator) -> Tensor:
        """Scalar, before its weight."""
        ...


@dataclass(frozen=True)
class Wasserstein:
    """Squared 2-Wasserstein bound to a reference flow: both start from the same x_0 (ReinFlow, section 4.3).

    E || x_K(x_0; theta) - x_K(x_0; reference) ||^2 over one coupling of the two distributions, per element.

    Attributes:
        reference: the pretrained flow, frozen.
        weight: of the term.
    """

    reference: NoisyFlow
    weight: float
    name: str = "wasserstein"

    def loss(self, flow: NoisyFlow, batch: Minibatch, generator: torch.Generator) -> Tensor:
        """Mean squared distance of the two chunks; neither run changes the shared x_0."""
        start = batch.x[:, 0]
        noise = torch.randn(start.shape, generator=generator, device=start.device, dtype=start.dtype)
        with torch.no_grad():
            target = self.reference.flow(batch.observation, noise)
        return ((flow.flow(batch.observation, noise) - target) ** 2).mean()


@dataclass(frozen=True)
class BehaviourCloning:
    """The pretraining loss on demonstrations.

    Attributes:
        objective: the policy's own.
        demonstrations: normalised chunks.
        weight: of the term.
    """

    objective: Objective
    demonstrations: ChunkSampler
    weight: float
    name: str = "behaviour_cloning"

    def loss(self, flow: NoisyFlow, batch: Minibatch, generator: torch.Generator) -> Tensor:
        """The objective's loss on as many demonstrated chunks as the minibatch has."""
        device = batch.x.device
        index = torch.randint(len(self.demonstrations), (len(batch),), generator=generator, device=device)
        draws = self.objective.draw((len(batch), *batch.x.shape[2:]), generator, device)
        loss, _ = self.objective.loss(flow.network, self.demonstrations.batch(index), draws, None)
        return loss
