"""ODE solvers for dx/dt = v(x, t) from t = 0 to 1: each states how many evaluations a step costs.

A solver knows neither the network nor the path. Time is a Python float here: every sample of a batch is at
the same time, and a sampler can tabulate what depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


class Solver(Protocol):
    """One step of an explicit integrator."""

    evaluations: int
    order: int

    def step(self, velocity: Velocity, x: Tensor, t: float, h: float) -> Tensor:
        """x(t + h) from x(t)."""
        ...


class Euler:
    """x + h v(x, t): first order, one evaluation, left end-points."""

    evaluations = 1
    order = 1

    def step(self, velocity: Velocity, x: Tensor, t: float, h: float) -> Tensor:
        """x(t + h) from x(t)."""
        return x + h * velocity(x, t)


class Midpoint:
    """x + h v(x + h/2 v(x, t), t + h/2): second order, two evaluations."""

    evaluations = 2
    order = 2

    def step(self, velocity: Velocity, x: Tensor, t: float, h: float) -> Tensor:
        """x(t + h) from x(t)."""
        return x + h * velocity(x + h / 2 * velocity(x, t), t + h / 2)


class Heun:
    """x + h/2 (v(x, t) + v(x + h v(x, t), t + h)): second order, two evaluations."""

    evaluations = 2
    order = 2

    def step(self, velocity: Velocity, x: Tensor, t: float, h: float) -> Tensor:
        """x(t + h) from x(t)."""
        first = velocity(x, t)
        return x + h / 2 * (first + velocity(x + h * first, t + h))


SOLVERS: dict[str, Solver] = {"euler": Euler(), "midpoint": Midpoint(), "heun": Heun()}


def integrate(velocity: Velocity, x: Tensor, num_steps: int, solver: Solver) -> Tensor:
    """x(1) from x(0) in ``num_steps`` equal steps; NFE is ``num_steps * solver.evaluations``."""
    for k in range(num_steps):
        x = solver.step(velocity, x, k / num_steps, 1.0 / num_steps)
    return x
