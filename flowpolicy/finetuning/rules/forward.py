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
    pretrained one and every step of the iteration. No likelihood of a chain is needed. t is one of the K
    times at which the sampler evaluates the network. What the velocity is beyond the last of them, where
    |v - u|^2 is largest, has no effect on what is executed.

    Of a velocity only that part counts which leads to a chunk that can be executed: x_1(v) = x_t + (1 - t) v
    is held within the bounds. An action beyond them is executed as the bound, so that without it a bad chunk
    would drive v ever farther from a bound that v is beyond already.

    A policy that is tuned for its K steps, as a distilled student is, or that is told the length of a step,
    as a shortcut or mean-flow model is, has a velocity of those steps at the points of its chain alone: with
    injected noise the draws are those points x_k, and u is v_old(x_k) and the noise over the length of the
    step.

    Its ``train/kl`` is E |v - v_old|^2 / (2 ``SPREAD``^2) over executed actions: nats, if the chunks of both
    policies had Gaussian noise of that standard deviation and differed as the velocities do.

    Attributes:
        injects_noise: chunks are sampled from the chain, so that exploration is more than that of x_0. The
            noise network is not trained. A number: in that share of the environments; the others act as
            deployed, and come to states that no noisy chain comes to. On points of a chain, where they have
            nothing to teach, it is all of them.
        draws: of (t, x_0) for each chunk; an update costs in proportion. On points of a chain there are as
            many as it has steps.
        overshoot: weight of the squared distance from x_1(v) to the bounds, which brings it back there.
        pull: weight of the squared distance to the pretrained velocity.
    """

    injects_noise: Annotated[bool | float, within("[0, 1]")] = 0.75
    draws: Annotated[int, between(1, 1024)] = 4
    overshoot: NonNegativeFloat = 0.05
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
        if self._stays_on_the_chain(flow):
            t, x_t = flow.times.to(data.x.dtype).expand(len(data.x), -1), data.x[:, :-1]
            old = flow.velocity(data.observation, x_t, t)
            shocks = (data.x[:, 1:] - data.mean) / flow.lengths.to(data.x.dtype)[:, None, None]
            kept = {"t": t, "x_t": x_t, "u": old + shocks, "old": old}
        else:
            share, x_0 = shared_draws(data, self.draws, generator)
            t = flow.times.to(share.dtype)[(share * flow.num_steps).long().clamp(max=flow.num_steps - 1)]
            chunk, at = data.chunk[:, None], t[..., None, None]
            kept = {"t": t, "x_t": (1 - at) * x_0 + at * chunk, "u": chunk - x_0}
            velocity = flow.velocity(data.observation, kept["x_t"], t)
            kept["old"] = bounded(velocity, kept["x_t"], t, data.bounds)
        if reference is not None:
            kept["pretrained"] = reference.velocity(data.observation, kept["x_t"], t)
        return kept

    def loss(self, flow: NoisyFlow, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """The rule's own loss, and what holds the velocity."""
        x_t, t = batch.kept["x_t"], batch.kept["t"]
        velocity = flow.velocity(batch.observation, x_t, t)
        bounds = None if self._stays_on_the_chain(flow) else batch.bounds
        within = bounded(velocity, x_t, t, bounds)
        loss, metrics = self.policy_loss(within, batch)
        metrics = {"train/policy_loss": loss.detach(), **metrics}
        moved = executed_sum((within - batch.kept["old"]).detach() ** 2, batch).mean()
        metrics["train/kl"] = moved / (2 * SPREAD**2)
        if bounds is not None:
            beyond = (1 - t)[..., None, None] * (velocity - within)
            overshoot = executed_sum(beyond**2, batch).mean()
            loss, metrics["train/overshoot"] = loss + self.overshoot * overshoot, overshoot.detach()
        if self.pull:
            pull = executed_sum((velocity - batch.kept["pretrained"]) ** 2, batch).mean()
            loss, metrics["train/pull"] = loss + self.pull * pull, pull.detach()
        return loss, metrics

    def _stays_on_the_chain(self, flow: NoisyFlow) -> bool:
        return flow.knows_only_its_chain and bool(self.injects_noise)


def bounded(velocity: Tensor, x_t: Tensor, t: Tensor, bounds: Tensor | None) -> Tensor:
    """Velocities ``(B, n, T, A)`` from x_t whose x_1 is that of ``velocity`` within ``bounds`` ``(2, A)``."""
    if bounds is None:
        return velocity
    low, high = bounds
    left = (1 - t)[..., None, None]
    return (torch.minimum(torch.maximum(x_t + left * velocity, low), high) - x_t) / left


def executed_sum(values: Tensor, batch: Minibatch) -> Tensor:
    """Sum of ``(B, n, T, A)`` over the actions of each chunk that were executed, ``(B, n)``."""
    return (values * batch.chunk_mask[:, None]).sum((2, 3))
