"""Abnormal events of a control loop: all are counted, the first of each kind are described."""

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

    meaning: str

    def __new__(cls, number: int, meaning: str) -> Event:
        """A kind with a sentence for reports."""
        event = int.__new__(cls, number)
        event._value_, event.meaning = number, meaning
        return event

    DEADLINE_MISSED = 0, "A tick began more than a period late: the ticks in between did not happen."
    CLOCK_STEP = 1, "The clock went backwards, or forwards by more than the loop could have slept."
    OBSERVATION_MISSING = 2, "The robot gave no observation, or one without a key that the policy needs."
    OBSERVATION_INVALID = 3, "An observation of a wrong shape or type, with NaN, or without a usable time."
    OBSERVATION_STALE = 4, "The newest observation is older than allowed."
    INFERENCE_LATE = 5, "No new chunk within max_delay: the previous one went on."
    INFERENCE_ERROR = 6, "The policy raised an exception."
    INFERENCE_HANG = 7, "The policy gave no answer in time; its worker was replaced."
    INFERENCE_DIED = 8, "The worker's process ended; it was replaced."
    ACTION_INVALID = 9, "A sampled chunk or a command with a wrong shape, NaN or infinity."
    FAST_SAMPLER = 10, "The faster sampler's chunk was used."
    SAFE_ACTION = 11, "The robot was sent its safe action."
    LIMIT_BOUNDS = 12, "A command was held within the action bounds."
    LIMIT_VELOCITY = 13, "A command was held within the velocity limit."
    LIMIT_JERK = 14, "A command was held within the jerk limit."
    ROBOT_ERROR = 15, "The robot raised an exception when it was observed or commanded."
    DEAD_MAN = 16, "The dead-man switch was not held."
    WATCHDOG_STOP = 17, "Too many misses in a row: the robot was stopped."
    EPISODE = 18, "The world was reset: history and chunks were dropped."
    DRIVER_HANG = 19, "A call of the robot did not return in time; the watchdog beside the loop spoke."
    TAKE_OVER = 20, "The operator took command."
    HAND_BACK = 21, "The operator gave command back to the policy."
    OPERATOR_PAUSE = 22, "The operator paused the run: the robot got its safe action until it went on."
    OPERATOR_ERROR = 23, "The operator's device could not be read: the robot got its safe action."
    EPISODE_SUCCESS = 24, "An episode ended and was marked as a success."
    EPISODE_FAILURE = 25, "An episode ended and was marked as a failure."
    RECORDING_LOST = 26, "Steps could not be recorded: the disk was too slow, or full."


EXPLAINED = {event: event.meaning for event in Event}
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
            told = f": {detail}" if detail else ""
            log.warning("tick %d: %s%s (%d so far)", tick, name_of(event), told, before + count)

    def take_bits(self) -> int:
        """The kinds that occurred since the last call, as a bit mask."""
        bits, self.bits = self.bits, 0
        return bits

    def content(self) -> dict[str, Any]:
        """Counts and kept records, for JSON."""
        return {
            "counts": {name_of(event): self.counts[event] for event in Event if self.counts[event]},
            "records": [{**vars(record), "event": name_of(record.event)} for record in self.records],
        }


def name_of(event: Event) -> str:
    """The kind in words, as reports spell it."""
    return event.name.lower().replace("_", " ")
