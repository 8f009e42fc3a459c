"""The operator of a control loop: a person or a function that may take command, and judges episodes.

The loop asks the operator at every tick, right before a command is sent, so that a take-over reaches the
robot in the tick in which it is read. What the operator commands goes through the same gate as the policy's
actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.robot import Action, RobotSpec


@dataclass(frozen=True)
class Moment:
    """What an operator is told.

    Attributes:
        tick: of the loop.
        observation: the newest one, as the policy sees it: key -> ``shape``.
        proposed: the policy's action ``(A,)`` for this tick; None where it has none.
        sent: the last command ``(A,)`` that the robot was sent; None before the first.
    """

    tick: int
    observation: Mapping[str, NDArray[Any]]
    proposed: Action | None
    sent: Action | None


@dataclass(frozen=True)
class Intervention:
    """What an operator wants at a tick; nothing at all leaves the policy in command.

    Attributes:
        action: a command ``(A,)`` in place of the policy's.
        success: the episode ends here, as a success or as a failure.
        pause: the robot gets its safe action, and no chunk is sampled.
    """

    action: Action | None = None
    success: bool | None = None
    pause: bool = False


class Operator(Protocol):
    """A source of interventions. One object serves one loop."""

    name: ClassVar[str]

    def start(self, spec: RobotSpec, period: float) -> None:
        """Open the device, for a robot that is commanded every ``period`` seconds.

        Raises:
            ConfigError: it cannot be opened, or does not fit the robot.
        """

    def read(self, moment: Moment) -> Intervention:
        """What is wanted now; it may not wait. What it raises counts as an operator who cannot be heard."""

    def close(self) -> None:
        """Let go of the device; a second call does nothing."""


OPERATORS: dict[str, type[Operator]] = {}
"""By name; :func:`flowpolicy.plugins.register` adds one."""


class Console:
    """The loop's side: asks the operator, and names in the event log what changes.

    Args:
        operator: was started.
        events: the loop's.
        action_dim: A.

    Attributes:
        commands: the operator was in command when last asked.
        pauses: the operator had paused the run when last asked.
    """

    def __init__(self, operator: Operator, events: EventLog, action_dim: int) -> None:
        self._operator, self._events, self._dim = operator, events, action_dim
        self.commands = self.pauses = False

    def ask(self, moment: Moment) -> Intervention | None:
        """What the operator wants; None where that cannot be found out."""
        try:
            found = self._operator.read(moment)
            action = None if found.action is None else np.asarray(found.action, dtype=np.float32)
            if action is not None and action.shape != (self._dim,):
                raise ValueError(f"a command of shape {action.shape} in place of ({self._dim},)")
            found = Intervention(action, found.success, bool(found.pause))
        except Exception as error:  # a device, or a function of the user's, may raise anything
            line = f"{type(error).__name__}: {error}"[:200]
            self._events.add(Event.OPERATOR_ERROR, moment.tick, line)
            return None
        commands = found.action is not None and not found.pause
        if commands != self.commands:
            self._events.add(Event.TAKE_OVER if commands else Event.HAND_BACK, moment.tick)
        if found.pause and not self.pauses:
            self._events.add(Event.OPERATOR_PAUSE, moment.tick)
        self.commands, self.pauses = commands, found.pause
        return found
