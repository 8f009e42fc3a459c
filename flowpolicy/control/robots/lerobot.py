"""Any robot of lerobot as a robot of the control loop: its calls wait for the hardware, the loop does not."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowpolicy.control.robot import (
    EPISODE,
    PRESENT_POSE,
    TIMESTAMP,
    Action,
    Observation,
    RobotError,
    RobotSpec,
)
from flowpolicy.control.system import real_time_priority
from flowpolicy.errors import TaskError
from flowpolicy.settings import choose, require

STATE = "observation"
"""Key of the vector of scalar features."""
MOST_ERRORS = 100
"""Failed polls that nobody has asked about yet; older ones are forgotten."""
_PAUSE_S = 1e-3
"""The bus is left alone for at least this long after a poll, so that a command that waits gets its turn."""


class LeRobotRobot:
    """Polls a robot of lerobot in a thread and commands it from the loop's.

    Scalar features (``joint_1.pos``) become the vector ``observation``; features with a shape, such as images
    ``(h, w, 3)`` in uint8, keep their names. A command's numbers go to ``action_features`` in their order.
    Where all of these are observed too, as the positions of an arm are, an observation says the present pose.

    The robot is connected here without calibration, which asks questions on a terminal; one that is connected
    already is left so by :meth:`close`. Serial buses take one caller at a time: a command waits for a poll
    under way, at most ``act_timeout_s``. A poll begins with an empty port.

    Args:
        robot: a ``lerobot.robots.Robot``; lerobot itself is not imported here.
        rate_hz: polls a second, and the loop's native rate.
        action_low: ``(A,)`` least command, in the robot's units, in the order of its action features.
        action_high: ``(A,)`` greatest command.
        safe_action: see :class:`~flowpolicy.control.robot.RobotSpec`.
        observation: names of the scalar features in the order that the policy was trained with; None takes
            all in the robot's order.
        start_timeout_s: for the first observation.
        act_timeout_s: for the bus to be free; None takes one period.
        close_timeout_s: for a poll under way to end before the robot is disconnected all the same.

    Raises:
        TaskError: the robot cannot be connected, is not calibrated, gives no observation, or its features do
            not fit what was said of them.
    """

    def __init__(
        self,
        robot: Any,
        *,
        rate_hz: float,
        action_low: ArrayLike,
        action_high: ArrayLike,
        safe_action: str | tuple[float, ...] = "hold",
        observation: Sequence[str] | None = None,
        start_timeout_s: float = 10.0,
        act_timeout_s: float | None = None,
        close_timeout_s: float = 2.0,
    ) -> None:
        name = str(getattr(robot, "name", type(robot).__name__))
        scalars, shapes = _split(robot.observation_features, name)
        self._scalars = scalars if observation is None else _chosen(observation, scalars)
        self._shaped = list(shapes)
        self._actions = list(robot.action_features)
        low, high = (np.asarray(bound, dtype=np.float32) for bound in (action_low, action_high))
        if low.shape != (len(self._actions),):
            raise TaskError(
                f"{name} takes {len(self._actions)} numbers ({', '.join(self._actions)}) and action_low has "
                f"shape {low.shape}; give one bound for each."
            )
        if self._scalars:
            shapes[STATE] = (len(self._scalars),)
        port = getattr(getattr(robot, "config", None), "port", None)
        device = port if isinstance(port, str) else ""
        names = tuple(self._actions)
        self.spec = RobotSpec(
            name, shapes, low, high, rate_hz, safe_action, device=device, action_names=names
        )
        self._tells_pose = set(self._actions) <= set(scalars)
        act_timeout = 1 / rate_hz if act_timeout_s is None else act_timeout_s
        timeouts = {"start": start_timeout_s, "act": act_timeout, "close": close_timeout_s}
        for key, value in timeouts.items():
            require(value > 0, f"{key}_timeout_s", value, "positive")
        self._robot, self._timeouts = robot, timeouts
        self._bus = threading.Lock()
        self._newest: dict[str, Any] | None = None
        self._errors: deque[Exception] = deque(maxlen=MOST_ERRORS)
        self._ended, self._polled = threading.Event(), threading.Event()
        self._is_mine = self._connect()
        self._poller = threading.Thread(target=self._poll, daemon=True, name=f"poll {name}")
        self._poller.start()
        self._wait_for_first()

    def observe(self) -> Observation:
        """The newest observation, with the time at which its poll began.

        Raises:
            RobotError: polls failed since the last call, and how many; the next ones go on.
        """
        if self._errors:
            errors, self._errors = self._errors, deque(maxlen=MOST_ERRORS)
            error = errors[-1]
            raise RobotError(f"get_observation: {type(error).__name__}: {error}", len(errors)) from error
        newest = self._newest
        if newest is None or self._ended.is_set():
            raise RobotError(f"{self.spec.name} is closed.")
        return dict(newest)

    def act(self, action: Action) -> None:
        """Send a command ``(A,)``.

        Raises:
            RobotError: the bus was not free in time, the robot refused the command, or it is closed.
        """
        if self._ended.is_set():
            raise RobotError(f"{self.spec.name} is closed.", unsent=True)
        command = dict(zip(self._actions, action.tolist(), strict=True))
        if not self._bus.acquire(timeout=self._timeouts["act"]):
            busy = f"send_action: a poll holds the bus for over {self._timeouts['act']:g} s"
            raise RobotError(busy, unsent=True)
        try:
            self._robot.send_action(command)
        except Exception as error:  # a driver may raise anything
            raise RobotError(f"send_action: {type(error).__name__}: {error}") from error
        finally:
            self._bus.release()

    def close(self) -> None:
        """Stop polling, and disconnect what was connected here; a second call does nothing.

        Raises:
            RobotError: it could not be disconnected, and may still be powered.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        self._poller.join(self._timeouts["close"])
        if self._is_mine:
            try:
                self._robot.disconnect()
            except Exception as error:  # a driver may raise anything
                raise RobotError(f"disconnect: {type(error).__name__}: {error}") from error

    def _connect(self) -> bool:
        """Connect, unless somebody has; whether it was done here."""
        robot, name = self._robot, self.spec.name
        if robot.is_connected:
            return False
        try:
            robot.connect(calibrate=False)
            is_calibrated = robot.is_calibrated  # asks the motors
        except Exception as error:  # a driver may raise anything
            if robot.is_connected:
                with suppress(Exception):
                    robot.disconnect()
            raise TaskError(
                f"{name} cannot be connected ({type(error).__name__}: {error}); check its port and its power."
            ) from error
        if not is_calibrated:
            robot.disconnect()
            raise TaskError(f"{name} is not calibrated; run lerobot-calibrate for it first.")
        return True

    def _wait_for_first(self) -> None:
        deadline = time.monotonic() + self._timeouts["start"]
        while self._newest is None:
            left = deadline - time.monotonic()
            if left <= 0 or not self._polled.wait(left):
                error = self._errors[-1] if self._errors else None
                why = "" if error is None else f" ({type(error).__name__}: {error})"
                self.close()
                raise TaskError(
                    f"{self.spec.name} gave no observation within {self._timeouts['start']:g} s{why}; check "
                    "its cables and cameras."
                )
            self._polled.clear()
        self._errors.clear()  # of polls before it: cameras need a moment

    # The loop waits for the bus, and for the interpreter, while a poll holds them.
    @real_time_priority(whose="The robot's polls")
    def _poll(self) -> None:
        period = 1.0 / self.spec.rate_hz
        due = time.monotonic()
        while not self._ended.wait(max(due - time.monotonic(), _PAUSE_S)):
            due = max(due + period, time.monotonic())  # a slow poll is not made up for
            try:
                with self._bus:
                    _drop_late_answers(self._robot)
                    began = time.monotonic()
                    found = self._robot.get_observation()
                self._newest = {**self._arrays(found), TIMESTAMP: began}
            except Exception as error:  # a driver may raise anything; observe() tells of it
                self._errors.append(error)
            self._polled.set()

    def _arrays(self, found: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        missing = [key for key in (*self._scalars, *self._shaped) if key not in found]
        if missing:
            raise KeyError(f"no {', '.join(missing)} in it")
        arrays: dict[str, NDArray[Any]] = {key: np.array(found[key]) for key in self._shaped}
        if self._scalars:
            arrays[STATE] = np.array([found[key] for key in self._scalars], dtype=np.float32)
        if self._tells_pose:
            arrays[PRESENT_POSE] = np.array([found[key] for key in self._actions], dtype=np.float32)
        return arrays


def _drop_late_answers(robot: Any) -> None:
    """Empty what its serial ports have received: an answer that came after lerobot had given it up would be
    taken for the next poll's, and every later one for that of the poll after it."""
    for part in (robot, *getattr(robot, "__dict__", {}).values()):  # an arm, or two of them
        port = getattr(getattr(getattr(part, "bus", None), "port_handler", None), "ser", None)
        if port is not None:
            port.reset_input_buffer()


def _split(features: Mapping[str, Any], name: str) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Names of the scalar features, and the shapes of the others."""
    shapes = {key: tuple(kind) for key, kind in features.items() if isinstance(kind, (tuple, list))}
    scalars = [key for key in features if key not in shapes]
    for key in (STATE, TIMESTAMP, EPISODE, PRESENT_POSE):
        if key in shapes:
            raise TaskError(f"{name} has a feature '{key}', which means something else here; rename it.")
    return scalars, shapes


def _chosen(names: Sequence[str], scalars: list[str]) -> list[str]:
    offered = {key: key for key in scalars}
    return [choose(offered, name, "observation") for name in names]
