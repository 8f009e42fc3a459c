"""ODE solvers for dx/dt = v(x, t) from t = 0 to 1: each states how many evaluations a step costs.

A solver knows neither the network nor the path. Time is a Python float here: every sample of a batch is at
the same time, and a sampler can tabulate what depends on it. All that a solver does with x and v is to add
them and to multiply them by floats, so that its loop can be exported as a graph.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor

from flowpolicy.flow.grids import Grid
from flowpolicy.flow.network import Velocity
from flowpolicy.plugins import register
from flowpolicy.settings import choose, require

Step = Callable[[Callable[[Tensor, float], Tensor], Tensor, float, float], Tensor]
"""x(t + h) from a field v(x, t), x(t), t and h."""


class Solver(Protocol):
    """An explicit integrator."""

    @property
    def name(self) -> str:
        """In settings and files."""
        ...

    def nfe(self, num_steps: int) -> int:
        """Network evaluations of a chunk; a ConfigError where it cannot take so many steps."""
        ...

    def start(self) -> Step:
        """How to take the steps of one chunk; a multistep solver keeps earlier velocities there."""
        ...


SOLVERS: dict[str, Solver] = {}


class _OneStep:
    """A solver whose steps know nothing of each other, and cost ``evaluations`` each."""

    evaluations: ClassVar[int]

    def nfe(self, num_steps: int) -> int:
        """See :class:`Solver`."""
        return num_steps * self.evaluations

    def start(self) -> Step:
        """See :class:`Solver`."""
        return self.step

    def step(self, velocity: Callable[[Tensor, float], Tensor], x: Tensor, t: float, h: float) -> Tensor:
        """x(t + h) from x(t)."""
        raise NotImplementedError


class Euler(_OneStep):
    """x + h v(x, t): first order, one evaluation, left end-points."""

    name, evaluations = "euler", 1

    def step(self, velocity: Callable[[Tensor, float], Tensor], x: Tensor, t: float, h: float) -> Tensor:
        """x(t + h) from x(t)."""
        return x + h * velocity(x, t)


class Midpoint(_OneStep):
    """x + h v(x + h/2 v(x, t), t + h/2): second order, two evaluations."""

    name, evaluations = "midpoint", 2

    def step(self, velocity: Callable[[Tensor, float], Tensor], x: Tensor, t: float, h: float) -> Tensor:
        """x(t + h) from x(t)."""
        return x + h * velocity(x + h / 2 * velocity(x, t), t + h / 2)


class Heun(_OneStep):
    """x + h/2 (v(x, t) + v(x + h v(x, t), t + h)): second order, two evaluations."""

    name, evaluations = "heun", 2

    def step(self, velocity: Callable[[Tensor, float], Tensor], x: Tensor, t: float, h: float) -> Tensor:
        """x(t + h) from x(t)."""
        first = velocity(x, t)
        return x + h / 2 * (first + velocity(x + h * first, t + h))


class Taylor(_OneStep):
    """x + h v + h^2/2 dv/dt, the derivative along the path from a second evaluation h/8 ahead: second order.

    At h/2 it would be the midpoint rule, and at h Heun's; nearer to t it is the tangent that is followed.
    """

    name, evaluations = "taylor", 2
    ahead: ClassVar[float] = 0.125

    def step(self, velocity: Callable[[Tensor, float], Tensor], x: Tensor, t: float, h: float) -> Tensor:
        """x(t + h) from x(t)."""
        first, small = velocity(x, t), self.ahead * h
        change = velocity(x + small * first, t + small) - first
        return x + h * first + h / (2 * self.ahead) * change


@dataclass(frozen=True)
class AdamsBashforth:
    """The polynomial through the last p velocities, integrated over the step; one evaluation.

    It takes p velocities where there are so many: the first step is Euler's, with an error of the order h^2,
    once. So p = 2 is a method of second order, and p = 3 one of third order where the first steps are short.

    Attributes:
        orders: p of each step, 1 to 3; the last one is that of all further steps. ``ab3`` has (3,) and
            ``ab112`` (1, 1, 2).
    """

    orders: tuple[int, ...]

    @property
    def name(self) -> str:
        """``ab`` and the orders."""
        return "ab" + "".join(map(str, self.orders))

    def nfe(self, num_steps: int) -> int:
        """See :class:`Solver`."""
        require(len(self.orders) <= num_steps, "solver", self.name, f"of at most {num_steps} steps")
        return num_steps

    def start(self) -> Step:
        """See :class:`Solver`."""
        orders = itertools.chain(self.orders, itertools.repeat(self.orders[-1]))
        past: list[tuple[float, Tensor]] = []  # times and velocities, newest first

        def step(velocity: Callable[[Tensor, float], Tensor], x: Tensor, t: float, h: float) -> Tensor:
            past[:] = [(t, velocity(x, t)), *past[:2]]
            used = past[: next(orders)]
            for weight, (_, v) in zip(_integrals([(s - t) / h for s, _ in used]), used, strict=True):
                x = x + h * weight * v
            return x

        return step


def _integrals(nodes: list[float]) -> list[float]:
    """Integrals from 0 to 1 of the Lagrange polynomials of ``nodes``: what is exact for 1, s, s^2, ..."""
    powers = np.vander(nodes, increasing=True).T
    weights: list[float] = np.linalg.solve(powers, 1 / np.arange(1, len(nodes) + 1)).tolist()
    return weights


for _solver in (Euler(), Midpoint(), Heun(), Taylor(), AdamsBashforth((2,)), AdamsBashforth((3,))):
    register(SOLVERS)(_solver)


def build_solver(name: str) -> Solver:
    """The solver of this name, or a ConfigError that says which there are."""
    orders = re.fullmatch("ab([123]+)", name)
    return AdamsBashforth(tuple(map(int, orders[1]))) if orders else choose(SOLVERS, name, "solver")


def integrate(velocity: Velocity, x: Tensor, num_steps: int, solver: Solver, grid: Grid) -> Tensor:
    """x(1) from x(0) ``(B, T, A)``; NFE is ``solver.nfe(num_steps)``."""
    step = solver.start()
    for t, h in grid.steps(num_steps):

        def here(x: Tensor, t: float, h: float = h) -> Tensor:
            return velocity(x, t, h)

        x = step(here, x, t, h)
    return x
