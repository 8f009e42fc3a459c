"""What every way of training a policy has in common: a loss and the sampler that matches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch

Metrics = dict[str, Tensor]

MOST_STEPS = 1024
"""Integration steps K beyond which no chunk is sampled."""


class Network(Protocol):
    """A conditional velocity field: anything with these two calls can be trained and sampled."""

    def encode(self, observation: Mapping[str, Tensor]) -> Any:
        """Whatever depends on the observation alone."""
        ...

    def __call__(self, x: Tensor, t: Tensor, level: Tensor, context: Any) -> Tensor:
        """v(x, t, d, o) ``(B, T, A)``."""
        ...


@dataclass(frozen=True)
class Draws:
    """The random numbers behind a batch's loss, drawn apart from it.

    Drawn for the *global* batch and then cut, they make a loss computed by several processes equal to the
    loss computed by one.

    Attributes:
        noise: x_0 ``(B, T, A)``.
        t: flow times ``(B,)``.
        level: step-size levels ``(B,)`` int64.
    """

    noise: Tensor
    t: Tensor
    level: Tensor

    def __getitem__(self, rows: slice) -> Draws:
        return Draws(self.noise[rows], self.t[rows], self.level[rows])


class Objective(Protocol):
    """A loss and its sampler, both pure functions of what they are given."""

    name: ClassVar[str]

    @property
    def default_num_steps(self) -> int:
        """K used where a caller names none."""
        ...

    @property
    def num_levels(self) -> int:
        """Step-size levels the network is asked for."""
        ...

    @property
    def row_multiple(self) -> int:
        """A part of a batch that is computed by itself must have a multiple of this many rows."""
        ...

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """Random numbers for a batch of chunks of ``shape`` (B, T, A)."""
        ...

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """Scalar loss and metrics on a normalised batch; ``teacher`` is the EMA network, if one is used."""
        ...

    def check_steps(self, num_steps: int, solver: str) -> None:
        """Raise a ConfigError where the objective cannot be sampled so."""
        ...

    def nfe(self, num_steps: int, solver: str) -> int:
        """Network evaluations of one sample."""
        ...

    def level_of(self, num_steps: int) -> int:
        """Step-size level of K equal Euler steps; a ConfigError where nothing is integrated."""
        ...

    def sample(self, network: Network, context: Any, noise: Tensor, num_steps: int, solver: str) -> Tensor:
        """A normalised chunk ``(B, T, A)`` from x_0 ``(B, T, A)``."""
        ...


def masked_mean(squared_error: Tensor, mask: Tensor) -> Tensor:
    """Sum over the executed tokens divided by the number of all tokens and dimensions.

    ``squared_error`` is ``(B, T, A)``, ``mask`` ``(B, T)``. Dividing by a constant (and not by the number of
    True entries) gives each token the same weight in every batch and makes the mean over the parts of a
    batch the mean over the batch.
    """
    return (squared_error * mask[..., None]).mean()


def at_time(network: Network, context: Any, level: int) -> Callable[[Tensor, float], Tensor]:
    """The velocity field of a network at a fixed step-size level, as solvers want it."""

    def velocity(x: Tensor, t: float) -> Tensor:
        return network(x, x.new_full((1,), t), torch.full((1,), level, device=x.device), context)

    return velocity
