"""Inference beside the loop: requests go to a worker, chunks come back; spares stand by for it."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from flowpolicy.control.planner_hosts import (
    Answer,
    Build,
    Host,
    Planner,
    PlannerProcess,
    PlannerThread,
    Request,
)
from flowpolicy.runs.worker_process import WorkerDiedError
from flowpolicy.settings import choose, require

__all__ = [
    "Answer", "Planner", "ProcessWorker", "Request", "SparedWorker", "ThreadWorker", "Worker",
    "WorkerDiedError", "build_worker",
]  # fmt: skip

log = logging.getLogger(__name__)

SPARES = 2
"""Planners that wait beside the one at work: the loss of one, and of the next soon after, is survived."""
RETRY_S = 0.5
"""Pause after a planner could not be built: one that never can be is not built without end."""
WATCH_S = 0.5
"""How often it is looked whether the spares still live."""
CLOSE_S = 10.0
"""Most seconds that closing waits for a planner that is being built."""


class Worker(Protocol):
    """One planner at work beside the loop; it takes one request at a time."""

    def submit(self, request: Request) -> None:
        """Hand over a request; one answer follows, unless the worker is replaced first."""
        ...

    def poll(self, timeout: float = 0.0) -> Answer | None:
        """The next answer, waiting at most ``timeout`` seconds for it.

        Raises:
            WorkerDiedError: there will be none.
        """
        ...

    def ready(self, timeout: float = 0.0) -> bool:
        """Whether a planner is built, waiting at most ``timeout`` seconds for it, and for its spares.

        Raises:
            WorkerDiedError: it cannot be built.
        """
        ...

    def restart(self) -> None:
        """Give up the planner and whatever it has under way, and go on with a spare, without waiting."""
        ...

    def close(self) -> None:
        """End it; a second call does nothing."""
        ...


class SparedWorker:
    """A planner at work, and others, built already, of which one takes its place at once where it fails.

    A thread of its own builds planners and ends those that failed, so that nobody who calls the worker waits
    for either. The first planner may say how the next ones are built sooner (``planner.again``). A spare that
    ends while it waits is replaced too.

    Args:
        host: starts a planner in a place of its own.
        build: makes the planner there.
        spares: how many are kept; without any, a planner that fails is built anew while the loop goes on.
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
        """Number of the process that the planner at work is in."""
        if self._current is None:
            raise WorkerDiedError("No planner is at work.")
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
        """Put the stored planner to work where none is; whether one is at work."""
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
        """Build a planner and store it; False where that failed."""
        host, error = None, ""
        try:
            host = self._host(self._build)
            while not self._closed and not host.built(0.1):
                self._end_retired()
        except WorkerDiedError as died:
            error = str(died)
        # The place could not be had: no process, or nothing that can be sent to one.
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


class ThreadWorker(SparedWorker):
    """Planners in threads of this process: nothing is copied, and they share the interpreter with the loop.

    A thread cannot be ended from outside: a hanging one is left behind when it is replaced.
    """

    def __init__(self, build: Build, spares: int = SPARES) -> None:
        super().__init__(PlannerThread, build, spares)


class ProcessWorker(SparedWorker):
    """Planners in processes: one can be killed, and shares nothing with the loop but the cores.

    ``build`` is pickled.
    """

    def __init__(self, build: Build, spares: int = SPARES) -> None:
        super().__init__(PlannerProcess, build, spares)


WORKERS: dict[str, Callable[[Build, int], Worker]] = {"thread": ThreadWorker, "process": ProcessWorker}


def build_worker(kind: str, build: Build, spares: int = SPARES) -> Worker:
    """A worker of a kind: ``thread`` or ``process``; see :class:`SparedWorker`."""
    return choose(WORKERS, kind, "inference")(build, spares)
