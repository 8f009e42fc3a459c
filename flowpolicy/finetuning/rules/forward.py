"""Update rules on the forward process: velocities on the way from fresh noise to an executed chunk."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from flowpolicy.finetuning.chain import NoisyFlow
from flowpolicy.finetuning.rules.rule import Minibatch, UpdateRule, shared_draws
from flowpolicy.flow.objective import Metrics
from flowpolicy.ranges import NonNegativeFloat, between, within

SPREAD = 0.3
"""In normalised action units; about that of the noise that a whole chain injects, so that nats are alike."""


@dataclass(frozen=True)
class ForwardRule(UpdateRule):
    """A rule that compares the velocity at x_t = (1 - t) x_0 + t x_1 with u = x_1 - x_0.

    x_1 is the executed chunk; ``draws`` of (t, x_0) for each are shared by the behaviour policy, the
    pretrained one and every step of the iteration. No likelihood of a chain is needed.

    A policy that is tuned for its K steps, as a distilled student is, or that is told the length of a step,
    as a shortcut or mean-flow model is, has a velocity of those steps at the points of its chain alone: with
    injected noise the draws are those points x_k, and u is v_old(x_k) and the noise over the length of the
    step.

    Its ``train/kl`` is E |v - v_old|^2 / (2 ``SPREAD``^2) over executed actions: nats, if the chunks of both
    policies had Gaussian noise of that standard deviation and differed as the velocities do.

    Attributes:
        injects_noise: chunks are sampled from the chain, so that exploration is more than that of x_0. The
            noise network is not trained. A number: in that share of the environments; the others act as
            deployed, and come to states that no noisy chain comes to.
        draws: of (t, x_0) for each chunk; an update costs in proportion. On points of a chain there are as
            many as it has steps.
        pull: weight of the squared distance to the pretrained velocity.
    """

    injects_noise: Annotated[bool | float, within("[0, 1]")] = True
    draws: Annotated[int, between(1, 1024)] = 4
    pull: NonNegativeFloat = 0.0

    @property
    def needs_reference(self) -> bool:
        """See :class:`UpdateRule`."""
        return self.pull > 0

    @abstractmethod
    def policy_loss(self, velocity: Tensor, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """The loss of velocities ``(B, n, T, A)`` at the draws, before the pull, and further metrics."""

    def prepare(
        self, flow: NoisyFlow, data: Minibatch, reference: NoisyFlow | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Draws of ``t`` ``(B, n)``, ``x_t`` and ``u`` there, the ``old`` velocity and the pretrained one."""
        if flow.knows_only_its_chain and self.injects_noise:
            t, x_t = flow.times.to(data.x.dtype).expand(len(data.x), -1), data.x[:, :-1]
            old = flow.velocity(data.observation, x_t, t)
            shocks = (data.x[:, 1:] - data.mean) / flow.lengths.to(data.x.dtype)[:, None, None]
            kept = {"t": t, "x_t": x_t, "u": old + shocks, "old": old}
        else:
            t, x_0 = shared_draws(data, self.draws, generator)
            chunk, at = data.chunk[:, None], t[..., None, None]
            kept = {"t": t, "x_t": (1 - at) * x_0 + at * chunk, "u": chunk - x_0}
            kept["old"] = flow.velocity(data.observation, kept["x_t"], t)
        if reference is not None:
            kept["pretrained"] = reference.velocity(data.observation, kept["x_t"], t)
        return kept

    def loss(self, flow: NoisyFlow, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """The rule's own loss and the pull."""
        velocity = flow.velocity(batch.observation, batch.kept["x_t"], batch.kept["t"])
        loss, metrics = self.policy_loss(velocity, batch)
        metrics = {"train/policy_loss": loss.detach(), **metrics}
        moved = executed_sum((velocity - batch.kept["old"]).detach() ** 2, batch).mean()
        metrics["train/kl"] = moved / (2 * SPREAD**2)
        if self.pull:
            pull = executed_sum((velocity - batch.kept["pretrained"]) ** 2, batch).mean()
            loss, metrics["train/pull"] = loss + self.pull * pull, pull.detach()
        return loss, metrics


def executed_sum(values: Tensor, batch: Minibatch) -> Tensor:
    """Sum of ``(B, n, T, A)`` over the actions of each chunk that were executed, ``(B, n)``."""
    return (values * batch.chunk_mask[:, None]).sum((2, 3))
