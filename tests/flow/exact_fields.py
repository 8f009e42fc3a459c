"""Velocity fields known in closed form, in the place of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.flow.network import Network, field
from flowpolicy.flow.objective import Objective
from flowpolicy.flow.sampler_spec import SamplerSpec


class Field:
    """A network that is a formula: ``function(x, t, d)`` with t and d shaped to broadcast over x.

    ``calls`` keeps the (t, d) of every evaluation.
    """

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.function = function
        self.calls: list[tuple[Tensor, Tensor]] = []

    def encode(self, observation: Mapping[str, Tensor]) -> Any:
        return None

    def velocity(self, x: Tensor, t: Tensor, d: Tensor, context: Any) -> Tensor:
        self.calls.append((t.clone(), d.clone()))
        return self.function(x, t.view(-1, 1, 1), d.view(-1, 1, 1))


def sample(objective: Objective, network: Network, noise: Tensor, num_steps: int, solver: str) -> Tensor:
    """What a policy of this objective samples where observations play no part."""
    velocity = field(network, None, objective.step_size)
    return objective.sample(velocity, noise, SamplerSpec(num_steps=num_steps, solver=solver))


@dataclass
class GaussianFlow:
    """The flow from N(0, 1) to N(mean, std^2) along x_t = (1 - t) x_0 + t x_1, entry by entry.

    var_t = (1 - t)^2 + t^2 std^2 and the flow map keeps (x - t mean) / sqrt(var_t).
    """

    mean: float
    std: float

    def variance(self, t: Tensor) -> Tensor:
        return (1 - t) ** 2 + (t * self.std) ** 2

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_1 - x_0 | x_t = x]."""
        covariance = t * self.std**2 - (1 - t)
        return self.mean + covariance / self.variance(t) * (x - t * self.mean)

    def average_velocity(self, x: Tensor, t: Tensor, d: Tensor) -> Tensor:
        """(x(t + d) - x) / d along the flow."""
        end = t + d
        moved = end * self.mean + (self.variance(end) / self.variance(t)).sqrt() * (x - t * self.mean)
        return (moved - x) / d

    def least_loss(self) -> float:
        """Mean over t ~ U(0, 1) of Var[x_1 - x_0 | x_t], by the trapezoidal rule."""
        t = torch.linspace(0, 1, 20_001, dtype=torch.float64)
        covariance = t * self.std**2 - (1 - t)
        return float(torch.trapezoid(1 + self.std**2 - covariance**2 / self.variance(t), t))

    def batch(self, count: int, generator: torch.Generator, shape: tuple[int, int] = (1, 1)) -> Batch:
        action = self.mean + self.std * torch.randn((count, *shape), generator=generator)
        return Batch({"observation": torch.zeros(count, 1, 1)}, action, torch.ones(count, shape[0]).bool())


def energy_distance(first: Tensor, second: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of points ``(N, D)``; 0 for one distribution.

    The pairs within a set leave out each point with itself, so that the estimate has no bias.
    """

    def within(points: Tensor) -> Tensor:
        return torch.cdist(points, points).sum() / (len(points) * (len(points) - 1))

    return float(2 * torch.cdist(first, second).mean() - within(first) - within(second))
