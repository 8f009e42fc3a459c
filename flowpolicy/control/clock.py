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


SPIN_S = 3e-4
"""A sleep ends some 60 us late; the last stretch before a deadline is spent looking at the clock instead."""


class MonotonicClock:
    """``time.monotonic``: setting the machine's time does not touch it, and all processes share it."""

    def now(self) -> float:
        """Seconds of ``time.monotonic``."""
        return time.monotonic()

    def sleep_until(self, moment: float) -> None:
        """Sleep until shortly before, then watch the clock."""
        while (left := moment - SPIN_S - time.monotonic()) > 0:
            time.sleep(left)
        while time.monotonic() < moment:
            pass
