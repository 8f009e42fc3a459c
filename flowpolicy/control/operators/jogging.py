"""Commands from a direction that is held: of a key, or of a stick."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.operator import Moment
from flowpolicy.control.robot import Action, RobotSpec


class Jogging:
    """Moves the command from the one that was last sent, so that taking over never jumps.

    A robot whose safe action is ``zero`` is commanded to velocities (or torques): there the direction itself
    is the command, and no direction is zero.

    Args:
        spec: of the robot.
        period: seconds between commands.
        speed: change of the command per second at full deflection, as a share of its range; for velocities
            the share of their bound.
    """

    def __init__(self, spec: RobotSpec, period: float, speed: float) -> None:
        self._low, self._high = spec.action_low, spec.action_high
        self._is_velocity = spec.safe_action == "zero"
        self._step = speed * period * (self._high - self._low)
        self._speed = speed

    def command(self, direction: NDArray[np.float64], moment: Moment) -> Action | None:
        """The command ``(A,)`` for a direction ``(A,)`` in [-1, 1]; None with nothing to move from."""
        if self._is_velocity:
            bound = np.where(direction > 0, self._high, -self._low)
            return np.asarray(self._speed * direction * bound, dtype=np.float32)
        base = moment.sent if moment.sent is not None else moment.proposed
        if base is None:
            return None
        return np.clip(base + direction * self._step, self._low, self._high).astype(np.float32)
