"""The interface of losses on preferences: how a policy learns from decisions that come two by two."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.flow.network import Network
from flowpolicy.flow.objective import Draws, Loss, evaluations
from flowpolicy.flow.path import interpolate
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(Loss, prefix="loss"):
    """A loss on batches of :class:`~flowpolicy.preferences.sampling.PreferenceSampler`.

    Both rows of a pair have the same t and the same noise, so that what differs is what was done.

    Attributes:
        reference: the policy that acted in the segments, from which training starts.
    """

    reference: FlowPolicy = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reference.objective.require_flow()

    @property
    def row_multiple(self) -> int:
        """The rows of a pair stay together."""
        return 2

    @property
    def tuned(self) -> SamplerSpec | None:
        """The only way in which the policy may be sampled afterwards; None where any K stays good.

        A policy that is tuned for K steps, or that takes steps of a length, learns at those alone.
        """
        spec = self.reference.sampling
        has_steps = any(d > 0 for _, d in evaluations(self.reference.objective, spec))
        return spec if has_steps else self.reference.config.tuned

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """x_0, t and d, two rows each: of flow matching any t, else that of one of the K steps."""
        count = shape[0] // 2
        noise = torch.randn((count, *shape[1:]), generator=generator, device=device)
        if self.tuned is None:
            t = torch.rand(count, generator=generator, device=device)
            d = torch.zeros_like(t)
        else:
            places = torch.tensor(evaluations(self.reference.objective, self.tuned), device=device)
            number = torch.randint(len(places), (count,), generator=generator, device=device)
            t, d = places[number].unbind(1)
        return Draws(*(part.repeat_interleave(2, 0) for part in (noise, t, d)))


def velocity_at(network: Network, batch: Batch, draws: Draws) -> Tensor:
    """v(x_t, t, d, o) ``(B, T, A)`` on the way from the noise to the chunk."""
    x = interpolate(draws.noise, batch.action, draws.t)
    return network.velocity(x, draws.t, draws.d, network.encode(batch.observation))


def squared_distance(velocity: Tensor, other: Tensor, batch: Batch) -> Tensor:
    """|v - v'|^2 over the executed actions of each row, ``(B,)``."""
    return ((velocity - other) ** 2 * batch.mask[..., None]).sum((1, 2))
