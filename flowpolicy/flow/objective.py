"""The interface of training objectives: a loss and the sampler that matches it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowpolicy.data.sampling import Batch
from flowpolicy.errors import ConfigError
from flowpolicy.flow.network import Network, Velocity
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.flow.solvers import integrate
from flowpolicy.settings import Settings

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Draws:
    """The random numbers behind a batch's loss, drawn apart from it.

    Drawn for the *global* batch and then cut, they make a loss computed by several processes equal to the
    loss computed by one.

    Attributes:
        noise: x_0 ``(B, T, A)``.
        t: flow times ``(B,)``.
        d: step sizes ``(B,)``.
    """

    noise: Tensor
    t: Tensor
    d: Tensor

    def __getitem__(self, rows: slice) -> Draws:
        return Draws(self.noise[rows], self.t[rows], self.d[rows])


@dataclass(frozen=True)
class Auxiliary:
    """A network that a loss brings along and that learns beside the policy's, as a discriminator does.

    Both get their gradients from one backward pass of the loss; only those of the policy's are clipped. It
    belongs to the state of a training and not to the checkpoint.

    Attributes:
        network: on the policy's device.
        relative_rate: its learning rate over that of the policy's network.
        betas: Adam's.
    """

    network: nn.Module
    relative_rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)


class Loss(Settings, ABC):
    """What a network is trained by, a function of nothing but what it is given.

    Attributes:
        name: in settings and checkpoints.
        row_multiple: a part of a batch that is computed by itself must have a multiple of this many rows.
    """

    name: ClassVar[str]

    @property
    def row_multiple(self) -> int:
        """Rows are independent."""
        return 1

    @property
    def auxiliary(self) -> Auxiliary | None:
        """None: the loss has no network of its own."""
        return None

    @abstractmethod
    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """Random numbers for a batch of chunks of ``shape`` (B, T, A)."""

    def pair(self, draws: Draws, noise: Tensor, done: float) -> Draws:
        """The draws of a batch whose chunks a flow has made from the x_0 ``(B, T, A)`` that is given.

        ``done`` is the share of the training that lies behind, in [0, 1].
        """
        return replace(draws, noise=noise)

    @abstractmethod
    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """Scalar loss and metrics on a normalised batch; ``teacher`` is the EMA network, if one is used."""


class Objective(Loss, prefix="policy"):
    """A loss and its sampler.

    Attributes:
        is_flow: whether chunks are sampled by integrating a velocity field, which fine-tuning by a chain,
            caching and guidance need.
        levels: step sizes d = 0 and 1/M, 2/M, ..., 1 that a network tells apart: log2 M + 1, where the finest
            stands for d = 0; it interpolates between them. 1 where d plays no part.
    """

    is_flow: ClassVar[bool] = False
    default_num_steps: int

    @property
    def levels(self) -> int:
        """Step sizes play no part."""
        return 1

    @abstractmethod
    def check(self, spec: SamplerSpec) -> None:
        """Raise a ConfigError where chunks cannot be sampled with this K, solver and grid."""

    @abstractmethod
    def sample(self, velocity: Velocity, noise: Tensor, spec: SamplerSpec) -> Tensor:
        """A normalised chunk ``(B, T, A)`` from x_0 ``(B, T, A)``.

        Of ``noise`` and velocities nothing is asked but sums and products with floats.
        """

    def default_sampling(self) -> SamplerSpec:
        """K, solver and grid where a caller names none."""
        return SamplerSpec(num_steps=self.default_num_steps, solver="euler")

    def nfe(self, spec: SamplerSpec) -> int:
        """Network evaluations of one chunk."""
        return spec.nfe()

    def step_size(self, h: float) -> float:
        """The d that the network is asked for in an integration step of length h."""
        return 0.0

    def require_flow(self) -> None:
        """Raise a ConfigError where no flow is integrated."""
        if not self.is_flow:
            raise ConfigError(
                f"A {self.name} policy has no flow to integrate: it can be neither fine-tuned by ReinFlow "
                "nor cached or guided; take a flow_matching or a shortcut one."
            )


class Flow(Objective):
    """An objective whose chunks are solutions of dx/dt = v(x, t, d, o); d = 0 for any step by default."""

    is_flow = True

    def check(self, spec: SamplerSpec) -> None:
        """Any K, solver and grid that go together."""
        spec.solver_object.nfe(spec.steps)
        spec.grid_object.steps(spec.steps)

    def sample(self, velocity: Velocity, noise: Tensor, spec: SamplerSpec) -> Tensor:
        """Integrate from x_0 at t = 0 to t = 1."""
        return integrate(velocity, noise, spec.steps, spec.solver_object, spec.grid_object)


def masked_mean(squared_error: Tensor, mask: Tensor) -> Tensor:
    """Sum over the executed actions divided by the number of all actions and dimensions.

    ``squared_error`` is ``(B, T, A)``, ``mask`` ``(B, T)``. Dividing by a constant (and not by the number of
    True entries) gives each action the same weight in every batch and makes the mean over the parts of a
    batch the mean over the batch.
    """
    return (squared_error * mask[..., None]).mean()


def evaluations(objective: Objective, spec: SamplerSpec) -> list[tuple[float, float]]:
    """Flow time and step size of every network evaluation of a chunk, in their order."""
    found: list[tuple[float, float]] = []

    def velocity(x: Tensor, t: float, h: float) -> Tensor:
        found.append((t, objective.step_size(h)))
        return x

    objective.sample(velocity, torch.zeros(1), spec)
    return found
