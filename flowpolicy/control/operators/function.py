"""A function of the user's as the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from flowpolicy.control.operator import Intervention, Moment
from flowpolicy.control.robot import RobotSpec


class FunctionOperator:
    """Asks a function at every tick.

    Args:
        function: takes a :class:`~flowpolicy.control.operator.Moment`; gives an
            :class:`~flowpolicy.control.operator.Intervention`, a command ``(A,)``, or None, which leaves the
            policy in command. It runs inside the tick and may not wait.
    """

    name: ClassVar[str] = "function"

    def __init__(self, function: Callable[[Moment], Any]) -> None:
        self.function = function

    def start(self, spec: RobotSpec, period: float) -> None:
        """Nothing to open."""

    def read(self, moment: Moment) -> Intervention:
        """See :class:`~flowpolicy.control.operator.Operator`."""
        found = self.function(moment)
        return found if isinstance(found, Intervention) else Intervention(found)

    def close(self) -> None:
        """Nothing is held."""
