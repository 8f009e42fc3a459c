"""A jerk limit on commands that never builds up a velocity it could not brake in time."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_MARGIN = 0.7
"""Share of the braking curve that is used: it is that of continuous time."""
_NEAR = 2.0
"""Steps in which the last bit of the way is gone."""
_CALM = 0.5
"""Speed and acceleration, in units of the limit, below which a command is followed again as it is."""
_STOP_LENGTHS = (*range(2, 9), 10, 13, 17, 22, 29, 38, 50, 66, 86)
"""Steps within which a stop is looked for; a speed that takes longer to take away is not built up."""
_SLACK = 1e-9
"""Share of a limit by which arithmetic may miss it."""


class JerkLimiter:
    """Holds the third difference of a sequence of commands within a limit, each dimension by itself.

    Commands within it pass as they are. Clipping those that are not would be unstable: a third difference
    at its limit builds up speed that no later command may take away. Instead the command is approached
    as fast as it can be stopped at: the speed follows the curve of a stop with constant jerk,
    v = (distance sqrt(jerk))^(2/3), and is itself reached by the time-optimal discrete control of a double
    integrator (Han 2009, "From PID to Active Disturbance Rejection Control", equation 25). Once the robot is
    there and calm, commands pass again; one that keeps moving fast is trailed until it slows down.

    No limit ever has to give way to another: a command is sent only where the robot could still be stopped
    after it within all of them (:class:`StoppingPlans`), and otherwise the next step of the last such stop.

    Args:
        limit: ``(A,)`` greatest third difference per step cubed.
        velocity: ``(A,)`` greatest first difference per step, or None.
        bounds: least and greatest command, ``(A,)`` each, or None.
    """

    def __init__(
        self, limit: Vector, velocity: Vector | None = None, bounds: tuple[Vector, Vector] | None = None
    ) -> None:
        self.limit = np.asarray(limit, dtype=np.float64)
        self.velocity = np.full_like(self.limit, np.inf) if velocity is None else velocity
        self._binds = self.limit < 4 * self.velocity  # else no change of velocity can exceed it
        self._used = np.minimum(self.limit, self.velocity / 2)  # more would leap over the greatest velocity
        self._stops = StoppingPlans(self.limit, self.velocity, bounds)
        self.reset()

    def reset(self) -> None:
        """The robot stands still where it was last sent to."""
        self._approaching = np.zeros(len(self.limit), dtype=bool)
        self._stops.reset()

    def __call__(self, target: Vector, sent: tuple[Vector, Vector, Vector]) -> Vector:
        """The command to send ``(A,)`` for a target ``(A,)`` after the last three sent, newest first."""
        last, before, first = sent
        speed = last - before
        acceleration = speed - (before - first)
        asked = (target - last) - speed - acceleration
        calm = np.maximum(np.abs(target - last), np.abs(target - last - speed)) <= _CALM * self.limit
        passes = ~self._binds | ((np.abs(asked) <= self.limit) & (~self._approaching | calm))
        self._approaching = ~passes
        held = target
        if not passes.all():
            distance = target - (last + speed)
            stoppable = _MARGIN * np.cbrt(np.abs(distance) * np.sqrt(self._used)) ** 2
            wanted = np.minimum(np.minimum(stoppable, np.abs(distance) / _NEAR), self.velocity)
            jerk = _time_optimal(speed - np.sign(distance) * wanted, acceleration, self._used)
            held = np.where(passes, target, last + speed + acceleration + jerk)
        return self._stops(held, last, speed, acceleration)


class StoppingPlans:
    """Keeps, for a robot in motion, a stop within all limits, and refuses what would leave none.

    The stop of n steps is the one with the least squares of its third differences u, which are linear in the
    speed s and the acceleration a at its beginning: sum_k u_k = -a and sum_k (n + 1 - k) u_k = -(s + n a).
    Several lengths n are tried for each dimension. The backup of a reference governor (Garone, Di Cairano,
    Kolmanovsky 2017, "Reference and command governors for systems with constraints").

    Args:
        jerk: ``(A,)`` greatest third difference.
        velocity: ``(A,)`` greatest first difference; infinite where there is none.
        bounds: least and greatest position, ``(A,)`` each, or None.
    """

    def __init__(self, jerk: Vector, velocity: Vector, bounds: tuple[Vector, Vector] | None) -> None:
        free = np.full_like(jerk, np.inf)
        low, high = (-free, free) if bounds is None else bounds
        rows: list[Vector] = []
        kinds: list[int] = []
        self._starts, self._paths = [0], []
        for n in _STOP_LENGTHS:
            jerks, speeds, positions = _stop(n)
            self._paths.append(positions)
            rows += [jerks[[0, -1]], speeds, positions]  # jerks are linear in k: the ends are the extremes
            kinds += [0] * 2 + [1] * n + [2] * n
            self._starts.append(len(kinds))
        del self._starts[-1]
        self._rows, kind = np.concatenate(rows), np.array(kinds)
        room = _SLACK * np.where(np.isfinite(high - low), np.abs(low) + np.abs(high), 0)
        self._jerk, self._velocity, self._bounds = jerk * (1 + _SLACK), velocity, (low, high)
        fast = velocity * (1 + _SLACK)
        self._low = np.stack([-self._jerk, -fast, low - room])[kind]
        self._high = np.stack([self._jerk, fast, high + room])[kind]
        self.reset()

    def reset(self) -> None:
        """The robot stands still."""
        self._state: Vector | None = None  # (3, A): where the present stop began

    def __call__(self, wanted: Vector, last: Vector, speed: Vector, acceleration: Vector) -> Vector:
        """``wanted`` ``(A,)`` where a stop exists after it; elsewhere the next step of the present stop.

        Args:
            wanted: a position.
            last: the position before it.
            speed: the first difference before it.
            acceleration: the second difference before it.
        """
        if self._state is None:
            self._state = np.stack([0 * last, 0 * last, last])
            self._length, self._age = np.zeros(len(last), np.int64), np.zeros(len(last), np.int64)
        wanted = np.minimum(np.maximum(wanted, last - self._velocity), last + self._velocity)
        wanted = np.minimum(np.maximum(wanted, self._bounds[0]), self._bounds[1])
        new_speed = wanted - last
        state = np.stack([new_speed, new_speed - speed, wanted])
        course = self._rows @ state
        found = np.logical_and.reduceat((self._low <= course) & (course <= self._high), self._starts)
        ok = found.any(axis=0) & (np.abs(state[1] - acceleration) <= self._jerk)
        held = wanted.copy()
        for dim in np.flatnonzero(~ok):
            path = self._paths[self._length[dim]]
            held[dim] = path[min(self._age[dim], len(path) - 1)] @ self._state[:, dim]
        self._state = np.where(ok, state, self._state)
        self._length = np.where(ok, found.argmax(axis=0), self._length)
        self._age = np.where(ok, 0, self._age + 1)
        return held


@cache
def _stop(steps: int) -> tuple[Vector, Vector, Vector]:
    """Third and first differences and positions ``(n, 3)`` of a stop, of (speed, acceleration, position)."""
    summed = np.tril(np.ones((steps, steps)))
    one, count = np.ones(steps), np.arange(1.0, steps + 1)
    ends = np.stack([summed[-1], (summed @ summed)[-1]])  # of acceleration and speed
    start = np.array([[0.0, 1.0, 0.0], [1.0, steps, 0.0]])
    jerks = -np.linalg.pinv(ends) @ start
    speeds = summed @ summed @ jerks + np.stack([one, count, 0 * one], axis=1)
    positions = summed @ speeds + np.array([0.0, 0.0, 1.0])
    return jerks, speeds, positions


def _time_optimal(error: Vector, rate: Vector, limit: Vector) -> Vector:
    """Control within ``limit`` that brings ``error`` and its ``rate`` per step to zero soonest."""
    y = error + rate
    root = np.sqrt(limit * (limit + 8 * np.abs(y)))
    far = rate + np.sign(y) * (root - limit) / 2
    curve = np.where(np.abs(y) <= limit, rate + y, far)
    return np.where(np.abs(curve) <= limit, -curve, -limit * np.sign(curve))
