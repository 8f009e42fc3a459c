"""Everything out of the ordinary that happens in a control loop: counted always, described a few times."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

log = logging.getLogger(__name__)


class Event(IntEnum):
    """Kinds of events; the number is the bit in a telemetry row's ``events``."""

    DEADLINE_MISSED = 0
    CLOCK_STEP = 1
    OBSERVATION_MISSING = 2
    OBSERVATION_INVALID = 3
    OBSERVATION_STALE = 4
    INFERENCE_LATE = 5
    INFERENCE_ERROR = 6
    INFERENCE_HANG = 7
    INFERENCE_DIED = 8
    ACTION_INVALID = 9
    FAST_SAMPLER = 10
    SAFE_ACTION = 11
    LIMIT_BOUNDS = 12
    LIMIT_VELOCITY = 13
    LIMIT_JERK = 14
    ROBOT_ERROR = 15
    DEAD_MAN = 16
    WATCHDOG_STOP = 17
    EPISODE = 18
    DRIVER_HANG = 19


EXPLAINED = {
    Event.DEADLINE_MISSED: "A tick began more than a period late: the ticks in between did not happen.",
    Event.CLOCK_STEP: "The clock went backwards, or forwards by more than the loop could have slept.",
    Event.OBSERVATION_MISSING: "The robot gave no observation, or one without a key that the policy needs.",
    Event.OBSERVATION_INVALID: "An observation of a wrong shape or type, with NaN, or without a usable time.",
    Event.OBSERVATION_STALE: "The newest observation is older than allowed.",
    Event.INFERENCE_LATE: "No new chunk within the planned delay: the previous one went on.",
    Event.INFERENCE_ERROR: "The policy raised an exception.",
    Event.INFERENCE_HANG: "The policy gave no answer in time; its worker was replaced.",
    Event.INFERENCE_DIED: "The worker's process ended; it was replaced.",
    Event.ACTION_INVALID: "A planned chunk or a command of a wrong shape, or with NaN or infinity.",
    Event.FAST_SAMPLER: "The faster sampler's chunk was used.",
    Event.SAFE_ACTION: "The robot was sent its safe action.",
    Event.LIMIT_BOUNDS: "A command was held within the action bounds.",
    Event.LIMIT_VELOCITY: "A command was held within the velocity limit.",
    Event.LIMIT_JERK: "A command was held within the jerk limit.",
    Event.ROBOT_ERROR: "The robot raised an exception when it was observed or commanded.",
    Event.DEAD_MAN: "The dead-man switch was not held.",
    Event.WATCHDOG_STOP: "Too many misses in a row: the robot was stopped.",
    Event.DRIVER_HANG: "A call of the robot did not return in time; the watchdog beside the loop spoke.",
    Event.EPISODE: "The world was reset: history and chunks were dropped.",
}
"""What each kind means, for reports."""


@dataclass(frozen=True)
class Record:
    """One described event.

    Attributes:
        tick: of the loop.
        seconds: since the log was made.
        event: its kind.
        detail: one sentence or nothing.
    """

    tick: int
    seconds: float
    event: Event
    detail: str


class EventLog:
    """Counts events; keeps the first few of each kind with their details and logs ever fewer of them.

    Args:
        keep: records of each kind that are kept.
    """

    def __init__(self, keep: int = 100) -> None:
        self.keep = keep
        self.counts: Counter[Event] = Counter()
        self.records: list[Record] = []
        self.bits = 0
        self._start = time.monotonic()

    def add(self, event: Event, tick: int, detail: str = "", count: int = 1) -> None:
        """Count an event ``count`` times and set its bit; ``detail`` is kept for the first few."""
        before = self.counts[event]
        self.counts[event] = before + count
        self.bits |= 1 << event
        if before < self.keep:
            self.records.append(Record(tick, time.monotonic() - self._start, event, detail))
        # 1st, 10th, 100th ...: a fault at every tick must not become a fault of the logger.
        if before == 0 or len(str(before + count)) > len(str(before)):
            log.warning(
                "tick %d: %s%s (%d so far)",
                tick,
                name_of(event),
                f": {detail}" if detail else "",
                before + count,
            )

    def take_bits(self) -> int:
        """The kinds that occurred since the last call, as a bit mask."""
        bits, self.bits = self.bits, 0
        return bits

    def content(self) -> dict[str, Any]:
        """Counts and kept records, for JSON."""
        return {
            "counts": {name_of(event): self.counts[event] for event in Event if self.counts[event]},
            "records": [
                {"tick": r.tick, "seconds": r.seconds, "event": name_of(r.event), "detail": r.detail}
                for r in self.records
            ],
        }


def name_of(event: Event) -> str:
    """The kind in words, as reports spell it."""
    return event.name.lower().replace("_", " ")
