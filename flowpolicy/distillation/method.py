"""The interfaces of distillation methods: a loss on a teacher's pairs, for any K or for a small one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from flowpolicy.flow.network import Context, Network
from flowpolicy.flow.network import field as velocity_field
from flowpolicy.flow.objective import Draws, Loss
from flowpolicy.flow.sampler_spec import MOST_STEPS, SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.ranges import PositiveInt, at_most


@dataclass(frozen=True, kw_only=True)
class Method(Loss, prefix="method"):
    """How a student learns from a teacher, whose objective it has.

    A batch is of pairs: ``batch.action`` are the chunks x_1 that the teacher made, and ``draws.noise`` the
    x_0 that it made them of.

    Attributes:
        teacher: the policy that is distilled.
        follows_noise: whether the student learns the chunk of each x_0. A method that does not may have a
            teacher with a steering, which chooses among several of them.
    """

    follows_noise: ClassVar[bool] = True
    teacher: FlowPolicy = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.teacher.objective.require_flow()

    @property
    def sampling(self) -> SamplerSpec | None:
        """How chunks of the student are sampled; None: with any K, as its objective does it."""
        return None


@dataclass(frozen=True, kw_only=True)
class FewSteps(Method):
    """A method that trains for one K alone.

    Attributes:
        num_steps: that K, Euler steps of one length.
    """

    num_steps: Annotated[PositiveInt, at_most(MOST_STEPS)] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.teacher.objective.check(self.sampling)

    @property
    def sampling(self) -> SamplerSpec:
        """How chunks of the student are sampled."""
        return SamplerSpec(num_steps=self.num_steps, solver="euler", grid={"name": "uniform"})

    @property
    def step_size(self) -> float:
        """The d that the network is asked for in one of the K steps."""
        return self.teacher.objective.step_size(1 / self.num_steps)

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """Nothing is random but the pairs: t = 0, and the d of a step."""
        t = torch.zeros(shape[0], device=device)
        return Draws(torch.zeros(shape, device=device), t, torch.full_like(t, self.step_size))

    def sample(self, network: Network, context: Context, noise: Tensor) -> Tensor:
        """The student's chunk ``(B, T, A)`` from x_0, with gradients."""
        objective = self.teacher.objective
        return objective.sample(velocity_field(network, context, objective.step_size), noise, self.sampling)
