"""A teleoperator of lerobot as the operator: a leader arm, a gamepad, a phone."""

from __future__ import annotations

import importlib
import pkgutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from flowpolicy.control.operator import OPERATORS, Intervention, Moment
from flowpolicy.control.operators.keyboard import SWITCHES
from flowpolicy.control.operators.switches import FAILURE, SUCCESS, Switches
from flowpolicy.control.operators.terminal import Terminal
from flowpolicy.control.robot import Action, RobotSpec
from flowpolicy.control.system import real_time_priority
from flowpolicy.errors import ConfigError
from flowpolicy.plugins import register
from flowpolicy.ranges import PositiveFinite
from flowpolicy.settings import Settings, choose, require

_PAUSE_S = 1e-3


@register(OPERATORS)
@dataclass
class LeRobotTeleoperator(Settings, prefix="operator"):
    """Polls a teleoperator in a thread; the loop takes the newest of its actions.

    A teleoperator that has events (lerobot's gamepad) says by them who is in command, and success and
    failure. For any other the keys of the terminal do: space takes over and gives back, Enter marks success,
    backspace failure, tab pauses.

    Attributes:
        type: lerobot's name, such as ``so101_leader``.
        options: settings of its config class: ``port``, ``id``, ...
        names: the teleoperator's action features in the order of the robot's; None takes them by the robot's
            own names where it has them, else in the teleoperator's order.
        relative: the robot moves as the teleoperator does since it took over, from where the robot was; false
            sends its positions as they are, which jumps to them at the speed that ``control.safety`` allows.
        max_age_s: age of an action from which on the teleoperator counts as lost.
        teleoperator: a ``lerobot.teleoperators.Teleoperator``, in place of ``type``; lerobot itself is not
            imported then.
    """

    type: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    relative: bool = True
    max_age_s: PositiveFinite = 0.25
    teleoperator: Any = None
    name: ClassVar[str] = "lerobot"

    def start(self, spec: RobotSpec, period: float) -> None:
        """See :class:`~flowpolicy.control.operator.Operator`."""
        device = _made(self.type, self.options) if self.teleoperator is None else self.teleoperator
        self._names = self._order(list(_names_of(device)), spec)
        self._device, self._period, self._switches = device, period, Switches()
        self._is_velocity = spec.safe_action == "zero"
        self._has_events = hasattr(device, "get_teleop_events")
        self._newest: tuple[float, Action] | None = None
        self._error: Exception | None = None
        self._anchor: tuple[Action, Action] | None = None  # of robot and teleoperator when it took over
        self._ended = threading.Event()
        self._is_mine = not device.is_connected
        try:
            if self._is_mine:
                device.connect(calibrate=False)
            if not device.is_calibrated:
                raise ConfigError(f"{device} is not calibrated; run lerobot-calibrate for it first.")
            self._terminal = None if self._has_events else Terminal()
        except ConfigError:
            self._disconnect()
            raise
        except Exception as error:  # a driver may raise anything
            line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ConfigError(f"{device} cannot be connected ({line}).") from error
        self._poller = threading.Thread(target=self._poll, daemon=True, name="teleoperator")
        self._poller.start()

    def read(self, moment: Moment) -> Intervention:
        """See :class:`~flowpolicy.control.operator.Operator`."""
        for key in "" if self._terminal is None else self._terminal.typed():
            if key in SWITCHES:
                self._switches.press(SWITCHES[key])
        error, self._error = self._error, None
        if error is not None:
            raise error
        if self._newest is None:
            return self._switches.intervention(None)
        measured, action = self._newest
        age = time.monotonic() - measured
        if age > self.max_age_s:
            raise OSError(f"no action of the teleoperator for {age:.2f} s")
        found = self._switches.intervention(self._command(action, moment))
        if found.action is None:
            self._anchor = None
        return found

    def close(self) -> None:
        """Stop polling, restore the terminal, and disconnect what was connected here."""
        if not hasattr(self, "_poller") or self._ended.is_set():
            return
        self._ended.set()
        self._poller.join(2.0)
        if self._terminal is not None:
            self._terminal.close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._is_mine and self._device.is_connected:
            self._device.disconnect()

    def _command(self, action: Action, moment: Moment) -> Action | None:
        """What the robot is to do for the teleoperator's ``action``."""
        if not self.relative or self._is_velocity:
            return action
        if self._anchor is None:
            base = moment.sent if moment.sent is not None else moment.proposed
            if base is None:
                return None
            self._anchor = base, action
        return self._anchor[0] + (action - self._anchor[1])

    def _order(self, offered: list[str], spec: RobotSpec) -> list[str]:
        own = tuple(getattr(spec, "action_names", ()))
        names = self.names or (own if own and set(own) <= set(offered) else tuple(offered))
        known = {name: name for name in offered}
        chosen = [choose(known, name, "operator.names") for name in names]
        require(len(chosen) == spec.action_dim, "operator.names", names, f"{spec.action_dim} names")
        return chosen

    @real_time_priority(whose="The teleoperator's polls")
    def _poll(self) -> None:
        due = time.monotonic()
        while not self._ended.wait(max(due - time.monotonic(), _PAUSE_S)):
            due = max(due + self._period, time.monotonic())
            try:
                began = time.monotonic()
                if self._has_events:
                    self._take_events(self._device.get_teleop_events())
                found = self._device.get_action()
                values = [float(found[name]) for name in self._names]
                self._newest = began, np.array(values, dtype=np.float32)
            except Exception as error:  # a driver may raise anything; read() tells of it
                self._error = error

    def _take_events(self, events: dict[Any, Any]) -> None:
        found = {str(getattr(event, "value", event)): bool(value) for event, value in events.items()}
        if found.get("terminate_episode") or found.get("success"):
            self._switches.press(SUCCESS if found.get("success") else FAILURE)
            self._switches.pauses = False  # it has no button to go on with
        self._switches.commands = found.get("is_intervention", False)


def _names_of(device: Any) -> list[str]:
    """Names of the numbers of an action: lerobot's teleoperators declare them in two ways."""
    features = device.action_features
    return list(features["names"]) if "names" in features else list(features)


def _made(kind: str, options: dict[str, Any]) -> Any:
    try:
        package = importlib.import_module("lerobot.teleoperators")
    except ImportError as error:
        raise ConfigError(
            f"operator=lerobot needs the package {error.name!r}; install it with: pip install lerobot"
        ) from error
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            with suppress(ImportError):  # of a package that this teleoperator needs
                importlib.import_module(f"lerobot.teleoperators.{module.name}")  # registers its config
    config = choose(package.TeleoperatorConfig.get_known_choices(), kind, "operator.type")
    try:
        return package.make_teleoperator_from_config(config(**options))
    except (TypeError, ImportError, ValueError) as error:
        raise ConfigError(f"operator.type={kind} cannot be made: {error}.") from error
