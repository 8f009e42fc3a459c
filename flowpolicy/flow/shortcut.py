"""Shortcut models (Frans et al. 2024): one network that can take steps of any power-of-two size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.errors import ConfigError
from flowpolicy.flow.grids import Uniform
from flowpolicy.flow.network import Network
from flowpolicy.flow.objective import Draws, Flow, Metrics, masked_mean
from flowpolicy.flow.path import interpolate, per_sample, velocity_target
from flowpolicy.flow.sampler_spec import MOST_STEPS, SamplerSpec
from flowpolicy.flow.time_sampling import build_time_sampler
from flowpolicy.ranges import Allowed
from flowpolicy.settings import require, shown

_FINE = Allowed(
    lambda most: 2 <= most <= MOST_STEPS and _is_power_of_two(most),
    f"a power of two, at least 2 and at most {MOST_STEPS}",
)


@dataclass(frozen=True)
class Shortcut(Flow):
    """Flow matching at d = 0, self-consistency at coarser step sizes (Frans et al. 2024, eq. 5).

    d = 0, the instantaneous velocity, stands for the finest step 1/M; the coarser ones are 2/M, 4/M, ..., 1.
    Every ``1/bootstrap_fraction``-th sample of a batch is trained on one of these: its target is the mean of
    two consecutive velocities of half the step.

    Attributes:
        max_steps: M, a power of two.
        bootstrap_fraction: share of the batch that trains the coarse steps, 1 over an integer >= 2.
        bootstrap_from_ema: targets from the EMA network; False takes the network itself.
        time_sampling: distribution of t at d = 0.
        default_num_steps: K used where a caller names none.
    """

    name: ClassVar[str] = "shortcut"
    max_steps: Annotated[int, _FINE] = 32
    bootstrap_fraction: float = 0.25
    bootstrap_from_ema: bool = True
    time_sampling: dict[str, Any] = field(default_factory=lambda: {"name": "uniform"})
    default_num_steps: int = 4

    def __post_init__(self) -> None:
        build_time_sampler(self.time_sampling)
        super().__post_init__()
        share = self.bootstrap_fraction
        is_whole = 1e-4 <= share <= 0.5 and abs(self.row_multiple * share - 1) < 0.01
        allowed = "1 over an integer of at least 2 (1/2, 1/4, ...)"
        require(is_whole, "policy.bootstrap_fraction", share, allowed)
        self.check(SamplerSpec(num_steps=self.default_num_steps, solver="euler"))

    @property
    def levels(self) -> int:
        """log2 M + 1: d = 0 and the doublings of 1/M."""
        return self.max_steps.bit_length()

    @property
    def row_multiple(self) -> int:
        """Every this-many-th row trains a coarse step."""
        return round(1 / self.bootstrap_fraction)

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """x_0, t and d; a coarse d takes t from its own grid {0, d, ..., 1 - d}."""
        count = shape[0]
        noise = torch.randn(shape, generator=generator, device=device)
        t = build_time_sampler(self.time_sampling)(count, generator, device)
        doublings = torch.randint(1, self.levels, (count,), generator=generator, device=device)
        size = torch.exp2(doublings.float()) / self.max_steps
        grid = torch.floor(torch.rand(count, generator=generator, device=device) / size) * size
        is_coarse = torch.zeros(count, dtype=torch.bool, device=device)
        is_coarse[self._coarse_rows] = True
        return Draws(noise, torch.where(is_coarse, grid, t), torch.where(is_coarse, size, 0.0))

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """Masked mean squared error, flow-matching and bootstrap targets in one forward pass."""
        x = interpolate(draws.noise, batch.action, draws.t)
        target = velocity_target(draws.noise, batch.action)
        rows = self._coarse_rows
        judge = teacher if teacher is not None and self.bootstrap_from_ema else network
        observed = {key: value[rows] for key, value in batch.observation.items()}
        target[rows] = self.bootstrap_target(judge, observed, x[rows], draws.t[rows], draws.d[rows])
        velocity = network.velocity(x, draws.t, draws.d, network.encode(batch.observation))
        error = (velocity - target) ** 2
        loss = masked_mean(error, batch.mask)
        consistency = masked_mean(error.detach()[rows], batch.mask[rows])
        share = len(draws.t[rows]) / len(batch)
        flow = (loss.detach() - share * consistency) / max(1.0 - share, 1e-9)
        return loss, {"loss/flow_matching": flow, "loss/self_consistency": consistency}

    @torch.no_grad()
    def bootstrap_target(
        self, network: Network, observation: dict[str, Tensor], x: Tensor, t: Tensor, d: Tensor
    ) -> Tensor:
        """(s1 + s2) / 2 with s1 = v(x, t, d/2), s2 = v(x + d/2 s1, t + d/2, d/2).

        ``x`` is ``(B, T, A)``, ``t`` and ``d`` >= 2/M are ``(B,)``; the network takes d/2 = 1/M for d = 0.
        """
        context = network.encode(observation)
        half = d / 2
        first = network.velocity(x, t, half, context)
        second = network.velocity(x + per_sample(half, x) * first, t + half, half, context)
        return (first + second) / 2

    def check(self, spec: SamplerSpec) -> None:
        """K a power of two on the uniform grid; solvers other than Euler only at d = 0, for K >= M."""
        super().check(spec)
        if not _is_power_of_two(spec.steps):
            raise ConfigError(
                f"num_steps is {shown(spec.steps)}; a shortcut policy takes powers of two (1, 2, 4, ...), at "
                f"most {MOST_STEPS}."
            )
        if spec.grid_object != Uniform():
            raise ConfigError("A shortcut policy takes steps of one size; leave out grid.")
        if spec.solver != "euler" and spec.steps < self.max_steps:
            raise ConfigError(
                f"Solver '{spec.solver}' needs the instantaneous velocity; with a shortcut policy use "
                f"num_steps >= {self.max_steps} or solver=euler."
            )

    def step_size(self, h: float) -> float:
        """The step itself, 0 from the finest one down."""
        return h if h * self.max_steps > 1 else 0.0

    @property
    def _coarse_rows(self) -> slice:
        return slice(None, None, self.row_multiple)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
