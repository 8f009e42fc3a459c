"""The last T_o observations of a robot, checked as they come in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.robot import EPISODE, SUCCESS, TERMINATED, TIMESTAMP, TOTAL_REWARD
from flowpolicy.execution.history import HistoryBuffer
from flowpolicy.features import Feature
from flowpolicy.features.presence import completed


class ObservationHistory:
    """Keeps what a policy looks at; an observation that cannot be used changes nothing.

    Args:
        features: key -> feature.
        obs_horizon: T_o.
        events: where unusable observations are counted.
    """

    def __init__(self, features: Mapping[str, Feature], obs_horizon: int, events: EventLog) -> None:
        self._events = events
        self._features = dict(features)
        fields = {key: (feature.shape, feature.dtype) for key, feature in features.items()}
        self._buffer = HistoryBuffer(fields, 1, obs_horizon)  # of what was read and checked here
        self._episode: Any = None
        self.success: bool | None = None  # of the episode before the present one
        self.terminated = False  # likewise
        self.total_reward: float | None = None  # so far; None of a robot that does not tell
        self.measured = float("-inf")
        self.is_empty = True  # no observation with a time yet

    def add(self, observation: Any, tick: int, now: float) -> bool:
        """Take an observation; True where it begins another episode.

        The first one of an episode fills the whole history. Anything else than a mapping with an array of the
        right shape and type for each key, a number as timestamp and a number or text as episode is counted
        and dropped. A timestamp that is NaN or infinite makes it stale.
        """
        try:
            arrays, measured, episode, total = self._read(observation, now)
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
            self.success = _flag(observation.get(SUCCESS))
            self.terminated = bool(_flag(observation.get(TERMINATED)))
        self._buffer.add({key: array[None] for key, array in arrays.items()})
        self._episode = self._episode if episode is None else episode
        self.total_reward = self.total_reward if total is None else float(total)
        self.is_empty = False
        self.measured = measured
        return restarted

    def restart(self) -> None:
        """Another episode begins: its first observation fills the whole history."""
        self._buffer.restart()

    def age(self, now: float) -> float:
        """Seconds since the newest observation was measured; infinite where that is not known."""
        return now - self.measured

    def newest(self) -> dict[str, NDArray[Any]]:
        """A copy, key -> ``(T_o, *shape)``, oldest first."""
        return {key: rows.copy() for key, (rows,) in self._buffer.arrays.items()}

    def row(self) -> dict[str, NDArray[Any]]:
        """A copy of the newest observation alone, key -> ``shape``."""
        return {key: rows[-1].copy() for key, (rows,) in self._buffer.arrays.items()}

    def _read(self, observation: Any, now: float) -> tuple[dict[str, NDArray[Any]], float, Any, Any]:
        """Arrays, time, episode and rewards so far; None where it does not say.

        Raises:
            _UnusableError: says why.
        """
        if observation is None:
            raise _UnusableError("none", Event.OBSERVATION_MISSING)
        if not isinstance(observation, Mapping):
            raise _UnusableError(f"{type(observation).__name__} in place of a mapping from names to arrays")
        observation = completed(self._features, observation)
        missing = [key for key in self._features if key not in observation]
        if missing:
            raise _UnusableError(", ".join(missing), Event.OBSERVATION_MISSING)
        arrays = {key: _array(observation[key], key, feature) for key, feature in self._features.items()}
        measured = observation.get(TIMESTAMP, now)
        if not isinstance(measured, (int, float, np.number)) or isinstance(measured, np.complexfloating):
            raise _UnusableError(f"{TIMESTAMP} is {measured!r}, not a number of seconds"[:200])
        episode = observation.get(EPISODE)
        if not isinstance(episode, (int, float, str, np.number, NoneType)) or episode != episode:
            raise _UnusableError(f"{EPISODE} is {episode!r}, not a number"[:200])
        total = observation.get(TOTAL_REWARD)
        if not isinstance(total, (int, float, np.integer, np.floating, NoneType)):
            raise _UnusableError(f"{TOTAL_REWARD} is {total!r}, not a number"[:200])
        return arrays, float(measured), episode, total


class _UnusableError(Exception):
    """An observation that cannot be used."""

    def __init__(self, why: str, event: Event = Event.OBSERVATION_INVALID) -> None:
        super().__init__(why)
        self.event = event


def _flag(value: Any) -> bool | None:
    is_known = isinstance(value, (bool, int, float, np.number, np.bool_)) and value in (0, 1)
    return bool(value) if is_known else None


def _array(value: Any, key: str, feature: Feature) -> NDArray[Any]:
    """One observation of its kind, of the dtype that the policy takes."""
    array = np.asarray(feature.parsed(value))
    if array.dtype.kind not in "fiub":
        raise _UnusableError(f"{key}: a wrong type, {array.dtype}")
    if array.shape != feature.shape:
        raise _UnusableError(f"{key}: a wrong shape, {array.shape} in place of {feature.shape}")
    array = feature.array(array)
    problem = feature.problem(array)
    if problem:
        raise _UnusableError(f"{key} {problem}")
    return array
