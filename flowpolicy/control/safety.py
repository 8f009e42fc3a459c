"""The gate before a robot: nothing reaches ``act`` but finite commands within bounds and limits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.limits import JerkLimiter
from flowpolicy.control.robot import Action, Robot, RobotError
from flowpolicy.ranges import Allowed, PositiveFinite, PositiveInt
from flowpolicy.settings import Settings, require

Limit = float | tuple[float, ...] | None
_LIMIT = Allowed(
    lambda limit: bool(np.all(np.isfinite(limit)) and np.all(np.asarray(limit) > 0)),
    "finite and positive, or null",
)


@dataclass(frozen=True)
class SafetyConfig(Settings):
    """Limits of a robot's commands, in physical units of the command.

    Attributes:
        velocity_limit: most change of a command per second; one number, one for each dimension, or None.
        jerk_limit: most third derivative of the commands, per second cubed; likewise.
        max_observation_age_s: an observation older than this is stale, and the safe action is sent.
        miss_limit: safe actions in a row, for want of a valid one, after which the robot is stopped.
    """

    velocity_limit: Annotated[Limit, _LIMIT] = None
    jerk_limit: Annotated[Limit, _LIMIT] = None
    max_observation_age_s: PositiveFinite = 0.25
    miss_limit: PositiveInt = 100


class SafetyGate:
    """The only holder of a robot's ``act``.

    Bounds, velocity and jerk are those of the sequence of commands that the robot was sent, whatever they
    were and however long ago: a pause, a missed tick or a new episode entitles to no larger step. They never
    contradict each other (:class:`~flowpolicy.control.limits.JerkLimiter`), and hold on what the robot gets
    to within the rounding to float32, 4 eps |command|.

    The safe action alone is held within the bounds only: it must not wait. The robot counts as standing still
    where it put it, and whatever follows obeys the limits from there. The first command of all is free,
    unless it is said where the robot stands (:meth:`stand_at`).

    A command during which the robot raised an exception may have reached it or not, unless the exception says
    that it did not. Where there are limits to count, the safe action is then sent until one is taken without
    an exception, and counted from.

    Args:
        robot: whose commands pass.
        config: the limits.
        events: where interventions are counted.
        period: seconds between commands.
        dead_man: called at every command; False sends the safe action in its place.

    Raises:
        ConfigError: a limit of another length than the action.
    """

    def __init__(
        self, robot: Robot, config: SafetyConfig, events: EventLog, period: float,
        dead_man: Callable[[], bool] | None = None,
    ) -> None:  # fmt: skip
        spec = robot.spec
        self._robot, self._events, self._dead_man = robot, events, dead_man
        self._low, self._high = spec.action_low, spec.action_high
        self._dim = spec.action_dim
        self._velocity = _per_step(config.velocity_limit, period, spec.action_dim, "velocity_limit")
        jerk = _per_step(config.jerk_limit, period**3, spec.action_dim, "jerk_limit")
        bounds = self._low.astype(np.float64), self._high.astype(np.float64)
        self._jerk = None if jerk is None else JerkLimiter(jerk, self._velocity, bounds)
        self._sent: list[Action] = []  # the last three, newest first; before the first it stood still
        self._in_doubt = False  # whether the robot raised when it was last commanded
        self._last_valid: Action | None = None
        self._lock = threading.RLock()  # the loop's thread, and its watchdog's when that one hangs
        if spec.safe_action == "hold":
            self._safe = None
        elif spec.safe_action == "zero":
            self._safe = np.zeros(self._dim, dtype=np.float32)
        else:
            self._safe = np.asarray(spec.safe_action, dtype=np.float32)

    def send(self, command: NDArray[np.float32] | None, tick: int) -> tuple[Action | None, bool]:
        """Send a command, or the safe action where there is no valid one.

        Args:
            command: ``(A,)``; None asks for the safe action.
            tick: for the event log.

        Returns:
            What was sent, or None where nothing could be (a robot that holds, before its first command, or
            one that raised), and whether it was the command asked for, within its limits.
        """
        # Outside the lock: it is the user's function and may take its time.
        if command is not None and not self._is_held(tick):
            command = None
        with self._lock:
            return self._send(command, tick)

    def _send(self, command: NDArray[np.float32] | None, tick: int) -> tuple[Action | None, bool]:
        if command is not None and (
            command.shape != (self._dim,) or np.count_nonzero(np.isfinite(command)) < self._dim
        ):
            self._events.add(Event.ACTION_INVALID, tick, f"a command {command!r}"[:200])
            command = None
        if command is None or (self._in_doubt and self._counts):
            self._events.add(Event.SAFE_ACTION, tick)
            return self.send_safe(tick), False
        limited = self._limited(command, tick)
        if not self._act(limited, tick):
            return None, False
        self._last_valid = limited
        self._sent = [limited, *self._sent[:2]]
        return limited, True

    def stand_at(self, pose: Action) -> None:
        """The robot stands still at ``pose`` ``(A,)``, within the bounds, though nothing was sent yet: the
        first command obeys the limits from there."""
        with self._lock:
            self._sent = [pose]
            self._stand_still()

    def forget_hold(self) -> None:
        """In a new episode there is nothing to hold before its first command; limits go on counting."""
        self._last_valid = None

    def send_safe(self, tick: int) -> Action | None:
        """Send the safe action; what was sent, or None where nothing could be."""
        with self._lock:
            return self._send_safe(tick)

    def _send_safe(self, tick: int) -> Action | None:
        safe = self._last_valid if self._safe is None else self._safe
        if safe is None and self._in_doubt:  # in a new episode too: what it may have got is made sure of
            safe = self._sent[0]
        if safe is not None:
            safe = np.clip(safe, self._low, self._high)
            if not self._act(safe, tick):
                return None
            self._sent = [safe]
        self._stand_still()  # there, or, where there is nothing to hold, as it is
        return safe

    def _stand_still(self) -> None:
        """What comes next is counted from a robot at rest where it was last sent to."""
        self._sent = self._sent[:1]
        if self._jerk is not None:
            self._jerk.reset()

    @property
    def _counts(self) -> bool:
        """Whether there are limits that depend on what was sent."""
        return self._velocity is not None or self._jerk is not None

    def _is_held(self, tick: int) -> bool:
        if self._dead_man is None:
            return True
        try:
            held, detail = bool(self._dead_man()), ""
        except Exception as error:  # a switch that cannot be read is not held
            held, detail = False, f"{type(error).__name__}: {error}"[:200]
        if not held:
            self._events.add(Event.DEAD_MAN, tick, detail)
        return held

    def _limited(self, command: Action, tick: int) -> Action:
        result = self._within(command, self._low, self._high, Event.LIMIT_BOUNDS, tick)
        if not self._sent or not self._counts:
            return result
        bounded, last = result, self._sent[0]
        if self._velocity is not None:
            # Bounds of double precision: a limit below the rounding of the command lets it stand still.
            low, high = last - self._velocity, last + self._velocity
            result = self._within(result, low, high, Event.LIMIT_VELOCITY, tick)
        if self._jerk is not None:
            first = self._sent[-1]
            a, b, c = (row.astype(np.float64) for row in [*self._sent, first, first][:3])
            held = self._jerk(bounded.astype(np.float64), (a, b, c))
            result = self._counted(result, held, Event.LIMIT_JERK, tick)
        # What rounding to float32 may have carried beyond.
        return np.minimum(np.maximum(result, self._low), self._high)

    def _within(
        self, value: Action, low: NDArray[Any], high: NDArray[Any], event: Event, tick: int
    ) -> Action:
        return self._counted(value, np.minimum(np.maximum(value, low), high), event, tick)

    def _counted(self, value: Action, held: NDArray[Any], event: Event, tick: int) -> Action:
        held = held.astype(np.float32, copy=False)
        if np.count_nonzero(held == value) == self._dim:  # nearly always; the loop's time is short
            return held
        # A command on the limit, rounded, is no intervention.
        if np.abs(held - value).max() > 1e-6 * (1 + np.abs(value).max()):
            self._events.add(event, tick)
        return held

    def _act(self, action: Action, tick: int) -> bool:
        try:
            self._robot.act(action)
        except Exception as error:  # a driver may raise anything; the loop must not end of it
            self._events.add(Event.ROBOT_ERROR, tick, f"act: {type(error).__name__}: {error}"[:200])
            if isinstance(error, RobotError) and error.unsent:
                self._stand_still()
            else:
                self._in_doubt = True
                self._sent = self._sent or [action]
            return False
        self._in_doubt = False
        return True


def _per_step(limit: Limit, scale: float, dim: int, name: str) -> NDArray[np.float64] | None:
    if limit is None:
        return None
    values = np.asarray(limit, dtype=np.float64) * scale
    require(values.shape in ((), (dim,)), name, limit, f"one number or {dim}")
    return np.broadcast_to(values, (dim,))
