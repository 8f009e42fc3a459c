"""What an operator has switched on, from presses of keys or buttons."""

from __future__ import annotations

from flowpolicy.control.operator import Intervention
from flowpolicy.control.robot import Action

TAKE_OVER, SUCCESS, FAILURE, PAUSE = "take over", "success", "failure", "pause"


class Switches:
    """Who is in command, and whether the run is paused.

    A verdict ends the episode and pauses the run, so that the scene can be set up again; the next press of
    ``pause`` goes on with the policy in command, and one of ``take over`` with the operator.
    """

    def __init__(self) -> None:
        self.commands = self.pauses = False
        self._verdict: bool | None = None

    def press(self, switch: str) -> None:
        """A key or button was pressed."""
        if switch == TAKE_OVER:
            self.commands, self.pauses = not self.commands or self.pauses, False
        elif switch == PAUSE:
            self.commands, self.pauses = False, not self.pauses
        else:
            self._verdict, self.commands, self.pauses = switch == SUCCESS, False, True

    def intervention(self, action: Action | None) -> Intervention:
        """What the switches say now; ``action`` is what the operator would command."""
        verdict, self._verdict = self._verdict, None
        if verdict is not None:
            return Intervention(success=verdict)
        return Intervention(action if self.commands else None, pause=self.pauses)
