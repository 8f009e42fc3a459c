"""Commands held within a jerk limit without building up speed that cannot be taken away again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_MARGIN = 0.7
"""Share of the braking curve that is used: it is that of continuous time."""
_NEAR = 2.0
"""Steps in which the last bit of the way is gone."""
_CALM = 0.5
"""Speed and acceleration, in units of the limit, below which a command is followed again as it is."""


class JerkLimiter:
    """Holds the third difference of a sequence of commands within a limit, each dimension by itself.

    Commands within it pass as they are. Clipping those that are not would be unstable: a third difference
    at its limit builds up speed that no later command may take away. Instead the command is approached
    as fast as it can be stopped at: the speed follows the curve of a stop with constant jerk,
    v = (distance sqrt(jerk))^(2/3), and is itself reached by the time-optimal discrete control of a double
    integrator (Han 2009, "From PID to Active Disturbance Rejection Control", equation 25). Once the robot is
    there and calm, commands pass again; one that keeps moving fast is trailed until it slows down.

    Args:
        limit: ``(A,)`` greatest third difference per step cubed.
        velocity: ``(A,)`` greatest first difference per step while approaching, or None.
    """

    def __init__(self, limit: Vector, velocity: Vector | None = None) -> None:
        self.limit = np.asarray(limit, dtype=np.float64)
        self.velocity = np.full_like(self.limit, np.inf) if velocity is None else velocity
        self.reset()

    def reset(self) -> None:
        """The next command may be anything: the robot stands still."""
        self._approaching = np.zeros(len(self.limit), dtype=bool)

    def __call__(self, target: Vector, sent: tuple[Vector, Vector, Vector]) -> Vector:
        """The command to send ``(A,)`` for a target ``(A,)`` after the last three sent, newest first."""
        last, before, first = sent
        speed = last - before
        acceleration = speed - (before - first)
        asked = (target - last) - speed - acceleration
        calm = np.maximum(np.abs(target - last), np.abs(target - last - speed)) <= _CALM * self.limit
        passes = (np.abs(asked) <= self.limit) & (~self._approaching | calm)
        self._approaching = ~passes
        if passes.all():
            return target
        distance = target - (last + speed)
        stoppable = _MARGIN * np.cbrt(np.abs(distance) * np.sqrt(self.limit)) ** 2
        wanted = np.minimum(np.minimum(stoppable, np.abs(distance) / _NEAR), self.velocity)
        jerk = _time_optimal(speed - np.sign(distance) * wanted, acceleration, self.limit)
        held: Vector = np.where(passes, target, last + speed + acceleration + jerk)
        return held


def _time_optimal(error: Vector, rate: Vector, limit: Vector) -> Vector:
    """Control within ``limit`` that brings ``error`` and its ``rate`` per step to zero soonest."""
    y = error + rate
    root = np.sqrt(limit * (limit + 8 * np.abs(y)))
    far = rate + np.sign(y) * (root - limit) / 2
    curve = np.where(np.abs(y) <= limit, rate + y, far)
    return np.where(np.abs(curve) <= limit, -curve, -limit * np.sign(curve))
