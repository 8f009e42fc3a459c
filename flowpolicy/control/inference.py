"""Inference beside the loop: requests go to a worker and chunks come back, even if samplers fail.

The loop sends its requests to a :class:`Pipeline`, which counts every kind of failure.
A :class:`SparedWorker` runs one sampler and keeps spares ready, each in a thread or process of its own
(:mod:`flowpolicy.control.inference_hosts`).
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.events import Event, EventLog
from flowpolicy.control.inference_hosts import (
    Answer,
    Build,
    Host,
    Inference,
    InferenceProcess,
    InferenceThread,
    Request,
)
from flowpolicy.control.system import Clock
from flowpolicy.errors import FlowPolicyError
from flowpolicy.execution.fusion import Prefix
from flowpolicy.runs.worker_process import WorkerDiedError
from flowpolicy.settings import choose, require

__all__ = [
    "Answer",
    "Inference",
    "Pipeline",
    "Request",
    "SparedWorker",
    "Worker",
    "WorkerDiedError",
    "build_worker",
]

log = logging.getLogger(__name__)

SPARES = 2
"""Samplers kept ready beside the active one: enough to lose one, and soon after its successor."""
RETRY_S = 0.5
"""Pause after a failed build, so that a build that always fails is not repeated continuously."""
WATCH_S = 0.5
"""Interval at which the spares are checked."""
CLOSE_S = 10.0
"""Longest wait of ``close`` for a sampler that is being built."""


class Worker(Protocol):
    """Inference beside the loop, one request at a time."""

    def submit(self, request: Request) -> None:
        """Hand over a request; one answer follows, unless the worker is replaced first."""

    def poll(self, timeout: float = 0.0) -> Answer | None:
        """The next answer, waiting at most ``timeout`` seconds for it.

        Raises:
            WorkerDiedError: there will be none.
        """

    def ready(self, timeout: float = 0.0) -> bool:
        """Whether a sampler is built, waiting at most ``timeout`` seconds for it, and for its spares.

        Raises:
            WorkerDiedError: it cannot be built.
        """

    def restart(self) -> None:
        """Drop the active sampler with its request and switch to a spare, without waiting."""

    def close(self) -> None:
        """End it; a second call does nothing."""


class SparedWorker:
    """An active sampler, and spares, already built, one of which replaces it at once if it fails.

    A separate thread builds samplers and ends those that failed, so that no caller of the worker waits for
    either. The first sampler may offer a faster way to build the next ones (``Inference.again``). A spare
    that ends before it is used is replaced too.

    Args:
        host: starts a thread or process for a sampler.
        build: builds the sampler there.
        spares: how many are kept; with none, a sampler that fails is rebuilt while the loop goes on.
    """

    def __init__(self, host: Callable[[Build], Host], build: Build, spares: int = SPARES) -> None:
        require(spares >= 0, "spares", spares, "0 or more")
        self._host, self._build, self._spares = host, build, spares
        self._current: Host | None = None
        self._stored: deque[Host] = deque()  # built, and waiting for their turn
        self._error = ""  # why none could be built
        self._retired: deque[Host] = deque()
        self._closed = False
        self._supplied = threading.Condition()  # guards what is above
        self._needed = threading.Event()
        self._supplier = threading.Thread(target=self._supply, daemon=True, name="inference supply")
        self._supplier.start()
        # A thread that is inside torch while the interpreter ends would abort the program.
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        """Process ID of the active sampler."""
        if self._current is None:
            raise WorkerDiedError("No sampler is running.")
        return self._current.pid

    @property
    def waiting(self) -> int:
        """Number of spares that are built."""
        return len(self._stored)

    def submit(self, request: Request) -> None:
        """See :class:`Worker`."""
        if self._current is not None:
            self._current.submit(request)

    def poll(self, timeout: float = 0.0) -> Answer | None:
        """See :class:`Worker`."""
        return None if self._current is None else self._current.poll(timeout)

    def ready(self, timeout: float = 0.0) -> bool:
        """See :class:`Worker`."""
        until = time.monotonic() + timeout
        with self._supplied:
            while not self._take():
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._supplied.wait(left)
            while len(self._stored) < self._spares and not self._error:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._supplied.wait(left)
        return True

    def restart(self) -> None:
        """See :class:`Worker`."""
        with self._supplied:
            if self._current is not None:
                self._retired.append(self._current)
                self._current = None
            self._error = ""
            self._take()
        self._needed.set()

    def close(self) -> None:
        """See :class:`Worker`."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._needed.set()
        self._supplier.join(CLOSE_S)
        self._end_retired()
        for host in (self._current, *self._stored):
            if host is not None:
                host.end()

    def _take(self) -> bool:
        """Activate a spare if no sampler is active; whether one is active then."""
        if self._current is None:
            if self._stored:
                self._current = self._stored.popleft()
                self._needed.set()
            elif self._error:
                error, self._error = self._error, ""
                raise WorkerDiedError(error)
        return self._current is not None

    def _end_retired(self) -> None:
        with suppress(IndexError):
            while True:
                self._retired.popleft().end(now=True)

    def _supply(self) -> None:
        while not self._closed:
            self._needed.clear()
            self._end_retired()
            ended = [host for host in list(self._stored) if not host.alive()]
            with self._supplied:
                for host in ended:
                    if host in self._stored:
                        self._stored.remove(host)
                        self._retired.append(host)
                wanted = self._spares + (self._current is None)
            if len(self._stored) >= wanted:
                self._needed.wait(WATCH_S)
            elif not self._build_one():
                time.sleep(RETRY_S)

    def _build_one(self) -> bool:
        """Build a sampler and store it; False if that failed."""
        host, error = None, ""
        try:
            host = self._host(self._build)
            while not self._closed and not host.built(0.1):
                self._end_retired()
        except WorkerDiedError as died:
            error = str(died)
        # The host could not be started: no process, or a ``build`` that cannot be pickled.
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        if host is not None and (error or self._closed):
            host.end(now=not self._closed)
        with self._supplied:
            if error:
                if self._current is not None and not self._error:  # otherwise `ready` says so
                    log.warning("No spare could be built for inference: %s", error)
                self._error = error
            elif host is not None and not self._closed:
                self._build = host.again or self._build
                self._stored.append(host)
                self._error = ""
            self._supplied.notify_all()
        return not error


HOSTS: dict[str, Callable[[Build], Host]] = {"thread": InferenceThread, "process": InferenceProcess}


def build_worker(kind: str, build: Build, spares: int = SPARES) -> SparedWorker:
    """A sampler and its spares in a ``process`` or a ``thread`` each.

    A process can be killed and shares nothing with the loop but the cores; ``build`` is pickled for it.
    Nothing is copied for a thread, which shares the interpreter with the loop; one that hangs cannot be ended
    and is left behind when it is replaced.
    """
    return SparedWorker(choose(HOSTS, kind, "inference"), build, spares)


class Pipeline:
    """The loop's access to its worker: at most one request under way, and a new sampler if one is lost.

    Args:
        worker: samples the chunks.
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
        self._asked_at: float | None = None  # of the request under way
        self._forgotten = False
        self._replacing = False

    def wait_until_ready(self, timeout: float) -> None:
        """Wait for the worker to be built.

        Raises:
            FlowPolicyError: it cannot be built, or not in time.
        """
        try:
            is_ready = self.worker.ready(timeout)
        except WorkerDiedError as error:
            raise FlowPolicyError(str(error)) from error
        if not is_ready:
            raise FlowPolicyError(
                f"The policy was not ready after {timeout:g} s; raise start_timeout_s, "
                "or choose another backend."
            )

    @property
    def idle(self) -> bool:
        """Whether it can be asked: nothing is under way, and the worker lives."""
        return self._asked_at is None and not self._replacing

    def submit(self, step: int, observation: dict[str, NDArray[Any]], prefix: Prefix | None) -> None:
        """Ask an idle worker for a chunk."""
        self._asked_at = self.clock.now()
        self.worker.submit(Request(step, observation, prefix))

    def forget(self) -> None:
        """Discard the answer under way: its request belongs to an earlier episode."""
        self._forgotten = self._asked_at is not None

    def clock_stepped(self, seconds: float) -> None:
        """Shift the time of the request under way after the clock was set."""
        if self._asked_at is not None:
            self._asked_at += seconds

    def take(self, tick: int, wait: float) -> tuple[NDArray[np.float32], int, float] | None:
        """A finished chunk ``(T, A)``, the step of its request and its inference seconds; None if there is
        none yet, or if the request failed."""
        self.failed = False
        if self._replacing:
            self._see_replacement(tick)
        if self._asked_at is None:
            return None
        try:
            answer = self.worker.poll(wait)
        except WorkerDiedError as error:
            self._replace(Event.INFERENCE_DIED, tick, str(error))
            return None
        if answer is None:
            if self.clock.now() - self._asked_at > self.hang_timeout:
                self._replace(Event.INFERENCE_HANG, tick, f"no answer in {self.hang_timeout:g} s")
            return None
        actions = None if self._forgotten else self._checked(answer, tick)
        self._asked_at, self._forgotten, self.failed = None, False, actions is None
        return None if actions is None else (actions, answer.step, answer.seconds)

    def _checked(self, answer: Answer, tick: int) -> NDArray[np.float32] | None:
        if answer.actions is None:
            self.events.add(Event.INFERENCE_ERROR, tick, answer.error)
            return None
        shape = answer.actions.shape
        if shape == self.shape and np.isfinite(answer.actions).all():
            return answer.actions
        what = "NaN or infinity" if shape == self.shape else f"shape {shape} in place of {self.shape}"
        self.events.add(Event.ACTION_INVALID, tick, f"a chunk with {what}")
        return None

    def _replace(self, event: Event, tick: int, detail: str) -> None:
        """Replace the active sampler; its request is lost."""
        self.events.add(event, tick, detail)
        self._asked_at, self._forgotten, self.failed = None, False, True
        self.worker.restart()
        self._see_replacement(tick)

    def _see_replacement(self, tick: int) -> None:
        try:
            self._replacing = not self.worker.ready()
        except WorkerDiedError as error:  # it could not be built; the worker tries again after a pause
            self._replacing = True
            self.events.add(Event.INFERENCE_DIED, tick, str(error))
