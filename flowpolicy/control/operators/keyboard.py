"""The keyboard of the terminal as the operator."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from flowpolicy.control.operator import OPERATORS, Intervention, Moment
from flowpolicy.control.operators.jogging import Jogging
from flowpolicy.control.operators.switches import FAILURE, PAUSE, SUCCESS, TAKE_OVER, Switches
from flowpolicy.control.operators.terminal import Terminal
from flowpolicy.control.robot import RobotSpec
from flowpolicy.plugins import register
from flowpolicy.ranges import Allowed, PositiveFinite
from flowpolicy.settings import Settings

log = logging.getLogger(__name__)

SWITCHES = {" ": TAKE_OVER, "\n": SUCCESS, "\r": SUCCESS, "\x7f": FAILURE, "\b": FAILURE, "\t": PAUSE}
"""Space, Enter, backspace and tab."""
_PAIRS = Allowed(
    lambda pair: len(pair) == 2 and not set(pair) & set(SWITCHES), "two letters, such as qa: up and down"
)


@register(OPERATORS)
@dataclass
class Keyboard(Settings, prefix="operator"):
    """Space takes over and gives back, Enter and backspace mark success and failure, tab pauses and goes on.

    A letter takes over too, and moves one dimension of the command for as long as it is held.

    Attributes:
        keys: for each dimension the letter that increases it and the one that decreases it; dimensions
            without a pair stay where they are.
        speed: change of a command per second, as a share of its range.
        press_s: for how long a press moves; a held key repeats within it.
    """

    keys: tuple[Annotated[str, _PAIRS], ...] = ("qa", "ws", "ed", "rf", "tg", "yh", "uj", "ik")
    speed: PositiveFinite = 0.25
    press_s: PositiveFinite = 0.15
    name: ClassVar[str] = "keyboard"

    def start(self, spec: RobotSpec, period: float) -> None:
        """See :class:`~flowpolicy.control.operator.Operator`."""
        self._jogging, self._switches = Jogging(spec, period, self.speed), Switches()
        self._ticks = max(1, round(self.press_s / period))
        self._until = np.zeros((2, spec.action_dim), dtype=np.int64)  # first tick in which it does not move
        pairs = self.keys[: spec.action_dim]
        self._letters = {
            letter: (sign, dim) for dim, pair in enumerate(pairs) for sign, letter in enumerate(pair)
        }
        self._terminal = Terminal()
        log.info(
            "Space takes over and gives back; Enter: success, backspace: failure, tab: pause; %s move.",
            " ".join(f"{pair[0]}/{pair[1]}" for pair in pairs),
        )

    def read(self, moment: Moment) -> Intervention:
        """See :class:`~flowpolicy.control.operator.Operator`."""
        for key in self._terminal.typed():
            if key in SWITCHES:
                self._switches.press(SWITCHES[key])
            elif (place := self._letters.get(key.lower())) is not None and not self._switches.pauses:
                self._switches.commands = True
                self._until[place] = moment.tick + self._ticks
        up, down = self._until > moment.tick
        direction = up.astype(np.float64) - down
        return self._switches.intervention(self._jogging.command(direction, moment))

    def close(self) -> None:
        """Restore the terminal."""
        if hasattr(self, "_terminal"):
            self._terminal.close()
