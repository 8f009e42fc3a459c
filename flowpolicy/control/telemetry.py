"""Telemetry of every tick, in a preallocated ring buffer, and as a table on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.files.storage import atomic_file, write_table
from flowpolicy.settings import require

SOURCES = ("chunk", "previous", "fast", "safe", "operator")
"""Where a tick's action came from: the chunk that was due, the one before it, the faster sampler, the robot's
safe action, the operator."""
CHUNK, PREVIOUS, FAST, SAFE, OPERATOR = range(len(SOURCES))

_FIELDS = [
    ("tick", np.int64),  # number of the period since the start
    ("deadline", np.float64),  # s, when it should have begun
    ("started", np.float64),  # s, when it began
    ("finished", np.float64),  # s, when its command had been sent
    ("observation_age", np.float32),  # s, from measurement to the start of the tick; NaN without one
    ("inference", np.float32),  # s, of the chunk that arrived at this tick; NaN where none did
    ("delay", np.int16),  # actions executed from its observation to its arrival; -1 where none arrived
    ("chunk", np.int32),  # number of the chunk in use; -1 where none
    ("chunk_step", np.int16),  # its action in use
    ("source", np.int8),  # index into SOURCES
    ("seam", np.float32),  # rms change of the command at a change of chunk, in action ranges; else NaN
    ("events", np.int32),  # bit mask of control.events.Event
]


class Telemetry:
    """A ring of rows: the newest ``capacity`` ticks are kept.

    Args:
        capacity: rows.
        action_dim: A.
    """

    def __init__(self, capacity: int, action_dim: int) -> None:
        require(capacity >= 1, "telemetry capacity", capacity, "at least 1")
        dtype = np.dtype([*_FIELDS, ("action", np.float32, (action_dim,))])
        self._rows = np.zeros(capacity, dtype=dtype)
        self.written = 0

    def add(self, *values: Any) -> None:
        """Write a row over the oldest one; values in the order of the fields, the action last."""
        self._rows[self.written % len(self._rows)] = values
        self.written += 1

    def rows(self) -> NDArray[np.void]:
        """The kept rows, oldest first, as a structured array."""
        count, capacity = self.written, len(self._rows)
        if count <= capacity:
            return self._rows[:count].copy()
        return np.roll(self._rows, -(count % capacity), axis=0)

    def write(self, folder: Path) -> Path:
        """Write ``telemetry.parquet`` where pyarrow is installed, else ``telemetry.csv``; the file's path."""
        columns = self.columns()
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            return write_table(columns, folder / "telemetry.csv")
        path = folder / "telemetry.parquet"
        with atomic_file(path) as temporary:
            pq.write_table(pa.table(columns), temporary)
        return path

    def columns(self) -> dict[str, NDArray[Any]]:
        """The kept rows by column; actions are ``action_0``, ... and sources have their names."""
        rows = self.rows()
        columns: dict[str, NDArray[Any]] = {name: rows[name] for name, _ in _FIELDS}
        columns["source"] = np.array(SOURCES)[rows["source"]]
        action = rows["action"]
        return columns | {f"action_{i}": action[:, i] for i in range(action.shape[1])}
