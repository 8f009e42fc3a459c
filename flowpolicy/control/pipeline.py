"""One worker as the loop sees it: at most one request under way, every way it can fail counted and mended."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.clock import Clock
from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.inference import Request, Worker, WorkerDiedError
from flowpolicy.errors import FlowPolicyError
from flowpolicy.execution.fusion import Prefix

RESTART_PAUSE_S = 0.5
"""Least time between attempts to replace a worker: one that cannot be built is not built at every tick."""


class Pipeline:
    """Submits requests to a worker and takes its answers; replaces it where it hangs or dies.

    Args:
        worker: who plans.
        shape: of a chunk, (T, A).
        events: where failures are counted.
        hang_timeout: seconds after which a request counts as lost.
        clock: the loop's.

    Attributes:
        failed: the last call of :meth:`take` found that the request under way will have no answer.
    """

    def __init__(
        self, worker: Worker, shape: tuple[int, int], events: EventLog, hang_timeout: float, clock: Clock
    ) -> None:
        self.worker, self.shape, self.events, self.clock = worker, shape, events, clock
        self.hang_timeout = hang_timeout
        self.failed = False
        self._asked: int | None = None
        self._asked_at = 0.0
        self._forgotten = False
        self._dead = self._building = False
        self._restarted_at = float("-inf")

    def wait_until_ready(self, timeout: float) -> None:
        """Wait for the worker to be built.

        Raises:
            FlowPolicyError: it cannot be built, or not in time.
        """
        try:
            if not self.worker.ready(timeout):
                raise FlowPolicyError(
                    f"The policy was not ready after {timeout:g} s; raise start_timeout_s, "
                    "or choose another backend."
                )
        except WorkerDiedError as error:
            raise FlowPolicyError(str(error)) from error

    @property
    def idle(self) -> bool:
        """Whether it can be asked: nothing is under way, and the worker lives."""
        return self._asked is None and not self._dead and not self._building

    def submit(self, step: int, observation: dict[str, NDArray[Any]], prefix: Prefix | None) -> None:
        """Ask an idle worker for a chunk."""
        self._asked, self._asked_at = step, self.clock.now()
        self.worker.submit(Request(step, observation, prefix))

    def forget(self) -> None:
        """The answer under way is no longer wanted: it was asked for in another episode."""
        self._forgotten = self._asked is not None

    def clock_stepped(self, seconds: float) -> None:
        """The clock was set: a request under way is not older for it."""
        self._asked_at += seconds

    def take(self, tick: int, wait: float) -> tuple[NDArray[np.float32], int, float] | None:
        """A finished chunk ``(T, A)``, the step it was asked at and its planning seconds; None where there is
        none yet, or where the request failed."""
        self.failed = False
        if self._dead or self._building:
            self._mend(tick)
            return None
        if self._asked is None:
            return None
        try:
            answer = self.worker.poll(wait)
        except WorkerDiedError as error:
            self._fail(Event.INFERENCE_DIED, tick, str(error))
            return None
        if answer is None:
            if self.clock.now() - self._asked_at > self.hang_timeout:
                self._fail(Event.INFERENCE_HANG, tick, f"no answer in {self.hang_timeout:g} s")
            return None
        self._asked = None
        if self._forgotten:
            self._forgotten, self.failed = False, True
            return None
        if answer.actions is None:
            self.failed = True
            self.events.add(Event.INFERENCE_ERROR, tick, answer.error)
            return None
        if answer.actions.shape != self.shape or not np.isfinite(answer.actions).all():
            self.failed = True
            shape = answer.actions.shape
            what = "NaN or infinity" if shape == self.shape else f"shape {shape} in place of {self.shape}"
            self.events.add(Event.ACTION_INVALID, tick, f"a chunk with {what}")
            return None
        return answer.actions, answer.step, answer.seconds

    def _fail(self, event: Event, tick: int, detail: str) -> None:
        self.events.add(event, tick, detail)
        self._asked, self._forgotten, self.failed = None, False, True
        self._dead, self._building = True, False
        self._mend(tick)

    def _mend(self, tick: int) -> None:
        """Replace a dead worker, or see whether its replacement is built."""
        now = self.clock.now()
        if self._dead and abs(now - self._restarted_at) >= RESTART_PAUSE_S:
            self.worker.restart()
            self._restarted_at, self._dead, self._building = now, False, True
        if self._building:
            try:
                self._building = not self.worker.ready()
            except WorkerDiedError as error:
                self._fail(Event.INFERENCE_DIED, tick, str(error))
                return
            if not self._building:  # one that fails later is replaced at once
                self._restarted_at = float("-inf")
