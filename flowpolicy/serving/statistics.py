"""How a policy server fared: requests answered, how fast, and what went wrong."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np

from flowpolicy.acceleration.latency import percentiles

log = logging.getLogger(__name__)

KEPT = 100_000
"""Latencies of the newest answers that are kept."""


class ServerStatistics:
    """Counts and latencies; it does not grow with time.

    Attributes:
        answered: requests answered with actions.
        failures: everything else by its kind, of requests and of connections.
    """

    def __init__(self) -> None:
        self.answered = 0
        self.failures: Counter[str] = Counter()
        self._seconds = np.zeros(KEPT)

    def answer(self, seconds: float) -> None:
        """A request was answered ``seconds`` after it had arrived."""
        self._seconds[self.answered % KEPT] = seconds
        self.answered += 1

    def fail(self, kind: str) -> bool:
        """Count a failure; the 1st, 10th, 100th, ... of a kind are logged, and True is returned then."""
        self.failures[kind] += 1
        count = self.failures[kind]
        is_told = str(count).strip("0") == "1"
        if is_told:
            log.warning("%s (%d so far)", kind, count)
        return is_told

    def milliseconds(self) -> dict[str, float]:
        """p50, p95, p99, p99.9 and max from arrival to answer, of the newest answers; empty without any."""
        kept = self._seconds[: min(self.answered, KEPT)]
        return percentiles(1e3 * kept) if len(kept) else {}

    def line(self) -> str:
        """One line for a log."""
        times = self.milliseconds()
        speed = f", p50 {times['p50']:.2f} ms, p99 {times['p99']:.2f} ms" if times else ""
        return f"{self.answered} requests answered{speed}, {sum(self.failures.values())} failures"

    def content(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return {
            "answered": self.answered,
            "failures": dict(sorted(self.failures.items())),
            "milliseconds": self.milliseconds(),
        }
