"""The chunks of a control loop: asked for when due, taken when they come, and one chosen at each tick."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.history import ObservationHistory
from flowpolicy.control.inference import Pipeline
from flowpolicy.control.robot import Action
from flowpolicy.control.telemetry import CHUNK, FAST, PREVIOUS, SAFE
from flowpolicy.execution.fusion import Chunk, Fusion

Choice = tuple[Action | None, int, int, int]
"""A command, its source, and the number and step of its chunk."""
NOTHING: Choice = (None, SAFE, -1, -1)


@dataclass
class Status:
    """Where a running loop stands; read by others, written by the loop alone.

    Attributes:
        tick: number of the present period.
        misses: safe actions in a row, for want of a valid command.
        chunks: that have arrived.
        delay: actions executed while the last one was under way.
        inference: seconds of the last one.
        steps: actions executed: valid commands that the robot took.
        stopped: why the loop ended; empty while it runs.
        signal: number of the signal that ended it; 0 where none did.
    """

    tick: int = 0
    misses: int = 0
    chunks: int = 0
    delay: int = -1
    inference: float = float("nan")
    steps: int = 0
    stopped: str = ""
    signal: int = 0


class Chunks:
    """Keeps the chunks that the robot executes; they advance by executed actions, ``status.steps``.

    Args:
        main: samples them.
        fast: a faster sampler that fills gaps, or None.
        fusion: makes one action of overlapping ones.
        status: of the loop; the last chunk is entered there.
        events: of the loop.
        execute_horizon: T_e, after so many executed actions a new one is due.
        max_delay: actions of delay that a chunk leaves room for.
        budget_s: a new chunk is waited for where inference has taken less.
        fast_lead: actions left at which the faster sampler is asked.

    Attributes:
        is_due: a new one is asked for, whatever the last request says.
    """

    def __init__(
        self, main: Pipeline, fast: Pipeline | None, fusion: Fusion, status: Status, events: EventLog, *,
        execute_horizon: int, max_delay: int, budget_s: float, fast_lead: int,
    ) -> None:  # fmt: skip
        self.main, self.fusion = main, fusion
        self.is_due = True
        self._fast, self._status, self._events = fast, status, events
        self._execute_horizon, self._max_delay = execute_horizon, max_delay
        self._budget_s, self._fast_lead = budget_s, fast_lead
        self._pipelines = [main] if fast is None else [main, fast]
        self._newest: Chunk | None = None
        self._fast_chunk: Chunk | None = None
        self._asked_step = self._asked_tick = 0  # of the last request
        self._recent: deque[float] = deque(maxlen=16)
        self._late = -1

    def wait_until_ready(self, timeout_s: float) -> None:
        """See :meth:`Pipeline.wait_until_ready`."""
        for pipeline in self._pipelines:
            pipeline.wait_until_ready(timeout_s)

    def clock_stepped(self, seconds: float) -> None:
        """See :meth:`Pipeline.clock_stepped`."""
        for pipeline in self._pipelines:
            pipeline.clock_stepped(seconds)

    def drop(self) -> None:
        """What has been sampled, or is being, belongs to the past."""
        self.fusion.reset()
        self._newest = self._fast_chunk = None
        self.is_due = True
        for pipeline in self._pipelines:
            pipeline.forget()

    def collect(
        self, tick: int, history: ObservationHistory, *, may_ask: bool, holds: bool, operated: bool
    ) -> tuple[int, float]:
        """Take a finished chunk and ask for the next; its delay in steps (-1: none) and inference seconds.

        Args:
            tick: of the loop.
            history: what the policy looks at.
            may_ask: there is a fresh observation, and the run is not paused.
            holds: the last tick executed nothing.
            operated: the operator is in command: nothing of the chunk before was executed.
        """
        found = self._take(tick, 0.0, operated)
        step = self._status.steps
        used = tick - self._asked_tick if holds else step - self._asked_step
        if may_ask and (self.is_due or used >= self._execute_horizon) and self.main.idle:
            self.main.submit(step, history.newest(), None if operated else self.fusion.prefix(step))
            self._asked_step, self._asked_tick, self.is_due = step, tick, False
            if self._recent and not operated and statistics.median(self._recent) < self._budget_s:
                found = self._take(tick, self._budget_s, operated) or found
        return found if found is not None else (-1, float("nan"))

    def _take(self, tick: int, wait: float, operated: bool) -> tuple[int, float] | None:
        answer = self.main.take(tick, wait)
        if answer is None:
            if self.main.failed:  # ask again with the newest observation
                self.is_due = True
            return None
        actions, start, seconds = answer
        status = self._status
        step = status.steps
        chunk = Chunk(actions, start, step, waited=tick - self._asked_tick - (step - start))
        if operated:
            self.fusion.reset()
            self._fast_chunk = None
        self.fusion.add(chunk)
        self._newest = chunk
        self._recent.append(seconds)
        status.chunks, status.delay, status.inference = status.chunks + 1, chunk.delay, seconds
        return chunk.delay, seconds

    def choose(self, tick: int) -> Choice:
        """The tick's command, its source, and the number and step of its chunk."""
        status = self._status
        now = status.steps
        action = self.fusion.action(now)
        if action is not None and self._newest is not None:
            step = now - self._newest.start
            late = step >= self._execute_horizon + self._max_delay
            if late and self._late != status.chunks:
                self._late = status.chunks
                self._events.add(Event.INFERENCE_LATE, tick)
            return action, PREVIOUS if late else CHUNK, status.chunks, step
        if self._fast_chunk is not None and (action := self._fast_chunk.at(now)) is not None:
            self._events.add(Event.FAST_SAMPLER, tick)
            return action, FAST, -2 - self._fast_chunk.start, now - self._fast_chunk.start
        return NOTHING

    def ask_fast(self, tick: int, history: ObservationHistory, *, fresh: bool) -> None:
        """Request a chunk from the faster sampler where the main one may leave a gap."""
        if self._fast is None:
            return
        step = self._status.steps
        answer = self._fast.take(tick, 0.0)
        if answer is not None:
            self._fast_chunk = Chunk(answer[0], answer[1], step)
        covered = max((c.end for c in (self._newest, self._fast_chunk) if c is not None), default=step)
        if fresh and self._status.chunks and covered - step <= self._fast_lead and self._fast.idle:
            self._fast.submit(step, history.newest(), None)
