"""Newest-value mailboxes between two processes: neither side ever waits for the other."""

from __future__ import annotations

from collections.abc import Mapping
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np

_SLOTS = 4


class Mailbox:
    """The newest of a stream of records, written by one process and read by another.

    A record goes to the next of four slots before it is announced, so that a reader has three further
    writes' time to copy it; it looks again where it was slower.

    Args:
        fields: name -> shape and dtype.
    """

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        self.dtype = np.dtype([(name, dtype, shape) for name, (shape, dtype) in fields.items()])
        self._memory = RawArray("b", 16 + _SLOTS * self.dtype.itemsize)
        self._attach()

    def _attach(self) -> None:
        self._count = np.frombuffer(self._memory, np.int64, 1)
        slots = np.frombuffer(self._memory, self.dtype, _SLOTS, 16)
        # A view of every field of every slot, made once: looking fields up in a record is what takes long.
        self._slots = [
            {name: slots[name][i : i + 1] for name in self.dtype.fields or ()} for i in range(_SLOTS)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "_memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    @property
    def count(self) -> int:
        """Records written so far."""
        return int(self._count[0])

    def write(self, **values: Any) -> None:
        """Put a record; all fields."""
        count = self._count[0]
        slot = self._slots[count % _SLOTS]
        for name, value in values.items():
            slot[name][0] = value
        self._count[0] = count + 1

    def read(self) -> dict[str, Any] | None:
        """A copy of the newest record by field, or None before the first."""
        while True:
            count = int(self._count[0])
            if count == 0:
                return None
            copy = {name: view.copy()[0] for name, view in self._slots[(count - 1) % _SLOTS].items()}
            if int(self._count[0]) < count + _SLOTS - 1:
                return copy
