"""The clock a control loop lives by."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that only go forwards, and a way to wait for them."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        ...

    def sleep_until(self, moment: float) -> None:
        """Return at ``moment``, or at once where it has passed."""
        ...


class MonotonicClock:
    """``time.monotonic``: setting the machine's time does not touch it, and all processes share it."""

    def now(self) -> float:
        """Seconds of ``time.monotonic``."""
        return time.monotonic()

    def sleep_until(self, moment: float) -> None:
        """Sleep; where the system wakes early, sleep again."""
        while (left := moment - time.monotonic()) > 0:
            time.sleep(left)
