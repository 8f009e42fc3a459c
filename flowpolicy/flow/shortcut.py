"""Shortcut models (Frans et al. 2024): one network that can take steps of any power-of-two size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.errors import ConfigError
from flowpolicy.flow.objective import MOST_STEPS, Draws, Metrics, Network, at_time, masked_mean
from flowpolicy.flow.path import interpolate, per_sample, velocity_target
from flowpolicy.flow.solvers import SOLVERS, integrate
from flowpolicy.flow.time_sampling import build_time_sampler
from flowpolicy.settings import choose, require, shown


@dataclass(frozen=True)
class Shortcut:
    """Flow matching at the finest level, self-consistency at the coarser ones (Frans et al. 2024, eq. 5).

    Level 0 is d = 0, the instantaneous velocity, and stands for the finest step 1/M; level j is the step
    2^j / M, up to level log2 M, a single step. Every ``1/bootstrap_fraction``-th sample of a batch is
    trained on a coarse level j >= 1: its target is the mean of two consecutive velocities at level j - 1.

    Attributes:
        max_steps: M, a power of two.
        bootstrap_fraction: share of the batch that trains the coarse levels, 1 over an integer >= 2.
        bootstrap_from_ema: targets from the EMA network; False takes the network itself.
        time_sampling: distribution of t at level 0.
        default_num_steps: K used where a caller names none.
    """

    name: ClassVar[str] = "shortcut"
    max_steps: int = 32
    bootstrap_fraction: float = 0.25
    bootstrap_from_ema: bool = True
    time_sampling: dict[str, Any] = field(default_factory=lambda: {"name": "uniform"})
    default_num_steps: int = 4

    def __post_init__(self) -> None:
        build_time_sampler(self.time_sampling)
        require(
            2 <= self.max_steps <= MOST_STEPS and _is_power_of_two(self.max_steps),
            "policy.max_steps",
            self.max_steps,
            f"a power of two, at least 2 and at most {MOST_STEPS}",
        )
        require(
            1e-4 <= self.bootstrap_fraction <= 0.5
            and abs(self.row_multiple * self.bootstrap_fraction - 1) < 0.01,
            "policy.bootstrap_fraction",
            self.bootstrap_fraction,
            "1 over an integer of at least 2 (1/2, 1/4, ...)",
        )
        self.check_steps(self.default_num_steps, "euler")

    @property
    def num_levels(self) -> int:
        """log2 M + 1: level 0 and the doublings of 1/M."""
        return self.max_steps.bit_length()

    @property
    def row_multiple(self) -> int:
        """Every this-many-th row trains a coarse level."""
        return round(1 / self.bootstrap_fraction)

    def step_size(self, level: Tensor) -> Tensor:
        """The step 2^level / M (1/M for level 0, which the network is asked for as d = 0)."""
        return torch.exp2(level.float()) / self.max_steps

    def draw(
        self, shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device | str
    ) -> Draws:
        """x_0, t and level; coarse levels take t from their own grid {0, 2d, ..., 1 - 2d}."""
        count = shape[0]
        noise = torch.randn(shape, generator=generator, device=device)
        t = build_time_sampler(self.time_sampling)(count, generator, device)
        coarse = torch.randint(1, self.num_levels, (count,), generator=generator, device=device)
        size = self.step_size(coarse)
        grid = torch.floor(torch.rand(count, generator=generator, device=device) / size) * size
        is_coarse = torch.zeros(count, dtype=torch.bool, device=device)
        is_coarse[self._coarse_rows] = True
        return Draws(noise, torch.where(is_coarse, grid, t), torch.where(is_coarse, coarse, 0))

    def loss(
        self, network: Network, batch: Batch, draws: Draws, teacher: Network | None = None
    ) -> tuple[Tensor, Metrics]:
        """Masked mean squared error, flow-matching and bootstrap targets in one forward pass."""
        x = interpolate(draws.noise, batch.action, draws.t)
        target = velocity_target(draws.noise, batch.action)
        rows = self._coarse_rows
        judge = teacher if teacher is not None and self.bootstrap_from_ema else network
        observed = {key: value[rows] for key, value in batch.observation.items()}
        target[rows] = self.bootstrap_target(judge, observed, x[rows], draws.t[rows], draws.level[rows])
        velocity = network(x, draws.t, draws.level, network.encode(batch.observation))
        error = (velocity - target) ** 2
        loss = masked_mean(error, batch.mask)
        consistency = masked_mean(error.detach()[rows], batch.mask[rows])
        share = len(draws.t[rows]) / len(batch)
        flow = (loss.detach() - share * consistency) / max(1.0 - share, 1e-9)
        return loss, {"loss/flow_matching": flow, "loss/self_consistency": consistency}

    @torch.no_grad()
    def bootstrap_target(
        self, network: Network, observation: dict[str, Tensor], x: Tensor, t: Tensor, level: Tensor
    ) -> Tensor:
        """(s1 + s2) / 2 with s1 = v(x, t, d), s2 = v(x + d s1, t + d, d).

        ``x`` is ``(B, T, A)``, ``t`` and ``level`` >= 1 are ``(B,)``, and d is half the step of ``level``.
        """
        context = network.encode(observation)
        finer = level - 1
        half = self.step_size(finer)
        first = network(x, t, finer, context)
        second = network(x + per_sample(half, x) * first, t + half, finer, context)
        return (first + second) / 2

    def check_steps(self, num_steps: int, solver: str) -> None:
        """K a power of two; solvers other than Euler only at d = 0, that is for K >= M."""
        choose(SOLVERS, solver, "solver")
        if not 1 <= num_steps <= MOST_STEPS or not _is_power_of_two(num_steps):
            raise ConfigError(
                f"num_steps is {shown(num_steps)}; a shortcut policy takes powers of two (1, 2, 4, ...), at "
                f"most {MOST_STEPS}."
            )
        if solver != "euler" and num_steps < self.max_steps:
            raise ConfigError(
                f"Solver '{solver}' needs the instantaneous velocity; with a shortcut policy use "
                f"num_steps >= {self.max_steps} or solver=euler."
            )

    def nfe(self, num_steps: int, solver: str) -> int:
        """K times the solver's evaluations a step."""
        return num_steps * SOLVERS[solver].evaluations

    def level_of(self, num_steps: int) -> int:
        """The level whose step is 1 / ``num_steps``; 0 (d = 0) for K >= M."""
        return max(self.max_steps // num_steps, 1).bit_length() - 1

    def sample(self, network: Network, context: Any, noise: Tensor, num_steps: int, solver: str) -> Tensor:
        """K steps of size 1/K at the level of that size."""
        self.check_steps(num_steps, solver)
        return integrate(
            at_time(network, context, self.level_of(num_steps)), noise, num_steps, SOLVERS[solver]
        )

    @property
    def _coarse_rows(self) -> slice:
        return slice(None, None, self.row_multiple)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
