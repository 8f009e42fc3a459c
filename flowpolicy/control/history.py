"""The last T_o observations of a robot, checked as they come in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.robot import EPISODE, TIMESTAMP
from flowpolicy.execution.history import HistoryBuffer, fields_of


class ObservationHistory:
    """Keeps what a policy looks at; an observation that cannot be used changes nothing.

    Args:
        shapes: key -> shape of one observation.
        obs_horizon: T_o.
        events: where unusable observations are counted.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], obs_horizon: int, events: EventLog) -> None:
        self._events = events
        self._fields = fields_of(shapes)
        self._buffer = HistoryBuffer(self._fields, 1, obs_horizon)
        self._episode: Any = None
        self.measured = float("-inf")
        self.is_empty = True  # nothing with a time was seen yet

    def add(self, observation: Any, tick: int, now: float) -> bool:
        """Take an observation; True where it begins another episode.

        The first one of an episode fills the whole history. Anything else than a mapping with an array of the
        right shape and type for each key, a number as timestamp and a number or text as episode is counted
        and dropped. A timestamp that is NaN or infinite makes it stale.
        """
        try:
            arrays, measured, episode = self._read(observation, now)
        except _UnusableError as error:
            self._events.add(error.event, tick, str(error))
            return False
        except Exception as error:  # a driver may hand over anything
            line = f"{type(error).__name__}: {error}"[:200]
            self._events.add(Event.OBSERVATION_INVALID, tick, line)
            return False
        if not math.isfinite(measured):
            self.measured, self.is_empty = float("-inf"), False
            return False
        restarted = episode is not None and self._episode is not None and episode != self._episode
        if restarted:
            self._buffer.restart()
        self._buffer.add({key: array[None] for key, array in arrays.items()})
        self._episode = self._episode if episode is None else episode
        self.is_empty = False
        self.measured = measured
        return restarted

    def age(self, now: float) -> float:
        """Seconds since the newest observation was measured; infinite where that is not known."""
        return now - self.measured

    def newest(self) -> dict[str, NDArray[Any]]:
        """A copy, key -> ``(T_o, *shape)``, oldest first."""
        return {key: rows.copy() for key, (rows,) in self._buffer.arrays.items()}

    def _read(self, observation: Any, now: float) -> tuple[dict[str, NDArray[Any]], float, Any]:
        """Arrays, time and episode; None where it does not say.

        Raises:
            _UnusableError: says why.
        """
        if observation is None:
            raise _UnusableError("none", Event.OBSERVATION_MISSING)
        if not isinstance(observation, Mapping):
            raise _UnusableError(f"{type(observation).__name__} in place of a mapping from names to arrays")
        missing = [key for key in self._fields if key not in observation]
        if missing:
            raise _UnusableError(", ".join(missing), Event.OBSERVATION_MISSING)
        arrays = {key: _array(observation[key], key, *field) for key, field in self._fields.items()}
        measured = observation.get(TIMESTAMP, now)
        if not isinstance(measured, (int, float, np.number)) or isinstance(measured, np.complexfloating):
            raise _UnusableError(f"{TIMESTAMP} is {measured!r}, not a number of seconds"[:200])
        episode = observation.get(EPISODE)
        if not isinstance(episode, (int, float, str, np.number, NoneType)) or episode != episode:
            raise _UnusableError(f"{EPISODE} is {episode!r}, not a number"[:200])
        return arrays, float(measured), episode


class _UnusableError(Exception):
    """An observation that cannot be used."""

    def __init__(self, why: str, event: Event = Event.OBSERVATION_INVALID) -> None:
        super().__init__(why)
        self.event = event


def _array(value: Any, key: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Of this shape and dtype; images must be uint8 already."""
    array = np.asarray(value)
    if array.dtype != dtype:
        if dtype is not np.float32 or array.dtype.kind not in "fiub":
            raise _UnusableError(f"{key}: a wrong type, {array.dtype}")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    if array.shape != shape:
        raise _UnusableError(f"{key}: a wrong shape, {array.shape} in place of {shape}")
    if not np.isfinite(array).all():
        raise _UnusableError(f"{key}: NaN or infinity")
    return array
