"""A gamepad as the operator, through pygame."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flowpolicy.control.operator import OPERATORS, Intervention, Moment
from flowpolicy.control.operators.jogging import Jogging
from flowpolicy.control.operators.switches import FAILURE, PAUSE, SUCCESS, Switches
from flowpolicy.control.robot import RobotSpec
from flowpolicy.errors import ConfigError
from flowpolicy.plugins import register
from flowpolicy.ranges import BelowOne, NonNegativeInt, PositiveFinite
from flowpolicy.settings import Settings


@register(OPERATORS)
@dataclass
class Gamepad(Settings, prefix="operator"):
    """The operator commands as long as a button is held, with the sticks.

    Numbers of axes and buttons are pygame's; those here are of most pads on Linux.

    Attributes:
        index: of the gamepad.
        axes: for each dimension the axis that moves it; dimensions without one stay where they are.
        inverted: axes whose sign is turned: pushing a stick forward is negative.
        take_over: button that is held to command.
        success: button that marks one.
        failure: button that marks one.
        pause: button that pauses, and goes on.
        speed: change of a command per second at full deflection, as a share of its range.
        dead_zone: deflection below which a stick is at rest.
    """

    index: NonNegativeInt = 0
    axes: tuple[NonNegativeInt, ...] = (0, 1, 4, 3)
    inverted: tuple[NonNegativeInt, ...] = (1, 4)
    take_over: NonNegativeInt = 5
    success: NonNegativeInt = 0
    failure: NonNegativeInt = 1
    pause: NonNegativeInt = 7
    speed: PositiveFinite = 0.25
    dead_zone: BelowOne = 0.1
    name: ClassVar[str] = "gamepad"

    def start(self, spec: RobotSpec, period: float) -> None:
        """See :class:`~flowpolicy.control.operator.Operator`."""
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # it needs no window
        os.environ.setdefault("SDL_JOYSTICK_ALLOW_BACKGROUND_EVENTS", "1")
        try:
            import pygame
        except ImportError as error:
            raise ConfigError(
                "operator=gamepad needs 'pygame'; install it with: pip install pygame"
            ) from error
        self._pygame: Any = pygame
        pygame.init()
        count = pygame.joystick.get_count()
        if self.index >= count:
            raise ConfigError(f"operator.index is {self.index}, and {count} gamepads are connected.")
        self._pad: Any = pygame.joystick.Joystick(self.index)
        axes, buttons = self._pad.get_numaxes(), self._pad.get_numbuttons()
        lacking = [axis for axis in self.axes[: spec.action_dim] if axis >= axes]
        lacking += [b for b in (self.take_over, self.success, self.failure, self.pause) if b >= buttons]
        if lacking:
            raise ConfigError(
                f"{self._pad.get_name()} has {axes} axes and {buttons} buttons, numbered from 0, and no "
                f"number {lacking[0]}; change operator.axes, take_over, success, failure or pause."
            )
        self._jogging, self._switches = Jogging(spec, period, self.speed), Switches()
        self._axes, self._dim = self.axes[: spec.action_dim], spec.action_dim
        self._held: set[str] = set()

    def read(self, moment: Moment) -> Intervention:
        """See :class:`~flowpolicy.control.operator.Operator`."""
        for event in self._pygame.event.get():
            if event.type == self._pygame.JOYDEVICEREMOVED:
                self._pad = None
        if self._pad is None:
            raise OSError("the gamepad was disconnected")
        buttons = {SUCCESS: self.success, FAILURE: self.failure, PAUSE: self.pause}
        held = {switch for switch, button in buttons.items() if self._pad.get_button(button)}
        for switch in held - self._held:
            self._switches.press(switch)
        self._held = held
        self._switches.commands = bool(self._pad.get_button(self.take_over)) and not self._switches.pauses
        return self._switches.intervention(self._jogging.command(self._direction(), moment))

    def close(self) -> None:
        """Let go of the gamepad."""
        if hasattr(self, "_pygame"):
            self._pygame.quit()

    def _direction(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        direction = np.zeros(self._dim)
        for dim, axis in enumerate(self._axes):
            value = float(self._pad.get_axis(axis)) * (-1 if axis in self.inverted else 1)
            size = max(abs(value) - self.dead_zone, 0.0) / (1 - self.dead_zone)
            direction[dim] = np.sign(value) * min(size, 1.0)
        return direction
