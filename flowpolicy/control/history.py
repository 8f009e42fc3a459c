"""The last T_o observations of a robot, checked as they come in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.robot import EPISODE, TIMESTAMP
from flowpolicy.observations import dtype_of


class ObservationHistory:
    """Keeps what a policy looks at; an observation that cannot be used changes nothing.

    Args:
        shapes: key -> shape of one observation.
        obs_horizon: T_o.
        events: where unusable observations are counted.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], obs_horizon: int, events: EventLog) -> None:
        self._events = events
        self._rows: dict[str, NDArray[Any]] = {
            key: np.zeros((obs_horizon, *shape), dtype_of(shape)) for key, shape in shapes.items()
        }
        self._episode: Any = None
        self._fresh = True
        self.measured = float("-inf")

    def add(self, observation: Mapping[str, Any] | None, tick: int, now: float) -> bool:
        """Take an observation; True where it begins another episode.

        The first one of an episode fills the whole history.
        """
        if observation is None or any(key not in observation for key in self._rows):
            missing = "none" if observation is None else ", ".join(self._rows.keys() - observation.keys())
            self._events.add(Event.OBSERVATION_MISSING, tick, missing)
            return False
        arrays = {key: self._array(observation[key], rows.dtype) for key, rows in self._rows.items()}
        for key, rows in self._rows.items():
            array = arrays[key]
            if array is None or array.shape != rows.shape[1:] or not np.isfinite(array).all():
                what = "a wrong shape or type"
                if array is not None and array.shape == rows.shape[1:]:
                    what = "NaN or infinity"
                self._events.add(Event.OBSERVATION_INVALID, tick, f"{key}: {what}")
                return False
        episode = observation.get(EPISODE)
        restarted = not self._fresh and episode != self._episode
        fill = self._fresh or restarted
        for key, rows in self._rows.items():
            if fill:
                rows[:] = arrays[key]
            else:
                rows[:-1] = rows[1:]
                rows[-1] = arrays[key]
        self._episode, self._fresh = episode, False
        self.measured = float(observation.get(TIMESTAMP, now))
        return restarted

    def age(self, now: float) -> float:
        """Seconds since the newest observation was measured; infinite before the first."""
        return now - self.measured

    def newest(self) -> dict[str, NDArray[Any]]:
        """A copy, key -> ``(T_o, *shape)``, oldest first."""
        return {key: rows.copy() for key, rows in self._rows.items()}

    @staticmethod
    def _array(value: Any, dtype: np.dtype[Any]) -> NDArray[Any] | None:
        """None where it is no array of numbers, or an image that is not uint8."""
        try:
            array = np.asarray(value, dtype=np.float32 if dtype == np.float32 else None)
        except (TypeError, ValueError):
            return None
        return array if array.dtype == dtype else None
