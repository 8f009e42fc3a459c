"""ODE solvers for dx/dt = v(x, t) from t = 0 to 1: each states how many evaluations a step costs.

A solver knows neither the network nor the path. Time is a Python float here: every sample of a batch is at
the same time, and a sampler can tabulate what depends on it. All that a solver does with x and v is to add
them and to multiply them by floats, so that its loop can be exported as a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor

from flowpolicy.flow.grids import Grid
from flowpolicy.flow.network import Velocity
from flowpolicy.plugins import register

Step = Callable[[Callable[[Tensor, float], Tensor], Tensor, float, float], Tensor]
"""x(t + h) from a field v(x, t), x(t), t and h."""


class Solver(Protocol):
    """An explicit integrator."""

    name: ClassVar[str]

    def nfe(self, num_steps: int) -> int:
        """Network evaluations of a chunk."""
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


for _solver in (Euler(), Midpoint(), Heun()):
    register(SOLVERS)(_solver)


def integrate(velocity: Velocity, x: Tensor, num_steps: int, solver: Solver, grid: Grid) -> Tensor:
    """x(1) from x(0) ``(B, T, A)``; NFE is ``solver.nfe(num_steps)``."""
    step = solver.start()
    for t, h in grid.steps(num_steps):

        def here(x: Tensor, t: float, h: float = h) -> Tensor:
            return velocity(x, t, h)

        x = step(here, x, t, h)
    return x
