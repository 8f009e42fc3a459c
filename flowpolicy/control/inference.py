"""Inference beside the loop: requests go to a worker, a thread or a process, and chunks come back."""

from __future__ import annotations

import multiprocessing
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.chunks import Prefix
from flowpolicy.errors import FlowPolicyError
from flowpolicy.settings import choose


@dataclass(frozen=True)
class Request:
    """What a chunk is to be planned from.

    Attributes:
        tick: actions executed before the newest observation.
        observation: key -> ``(T_o, *shape)``, oldest first, physical units.
        prefix: what the chunk should agree with, or None.
    """

    tick: int
    observation: dict[str, NDArray[Any]]
    prefix: Prefix | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Attributes:
        tick: of the request.
        actions: the chunk ``(T, A)`` in physical units, unchecked; None where the policy raised.
        seconds: that planning took.
        error: the exception in one line.
    """

    tick: int
    actions: NDArray[np.float32] | None
    seconds: float
    error: str = ""


Planner = Callable[[Request], NDArray[np.float32]]
"""From a request to a chunk ``(T, A)``."""


class WorkerDiedError(RuntimeError):
    """The worker's process ended, or its planner could not be built."""


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
        """Whether the planner is built, waiting at most ``timeout`` seconds for it.

        Raises:
            WorkerDiedError: it cannot be built.
        """
        ...

    def restart(self) -> None:
        """Give up whatever is under way and begin anew, without waiting."""
        ...

    def close(self) -> None:
        """End it; a second call does nothing."""
        ...


_READY = "ready"


def _serve(build: Callable[[], Planner], receive: Callable[[], Any], send: Callable[[Any], None]) -> None:
    """Build a planner and answer requests until None comes."""
    try:
        planner = build()
    except Exception as error:
        send(f"{type(error).__name__}: {error}" if not isinstance(error, FlowPolicyError) else str(error))
        return
    send(_READY)
    while (request := receive()) is not None:
        started = time.perf_counter()
        try:
            actions = np.asarray(planner(request), dtype=np.float32)
            answer = Answer(request.tick, actions, time.perf_counter() - started)
        except Exception as error:  # a policy may raise anything; the loop is told and goes on
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            answer = Answer(request.tick, None, time.perf_counter() - started, line)
        send(answer)


class ThreadWorker:
    """A planner in a thread of this process: nothing is copied, and it shares the interpreter with the loop.

    A thread cannot be ended from outside: a hanging one is left behind when the worker is replaced.

    Args:
        build: makes the planner, in the thread.
    """

    def __init__(self, build: Callable[[], Planner]) -> None:
        self._build = build
        self._start()

    def _start(self) -> None:
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._built = False
        threading.Thread(
            target=_serve,
            args=(self._build, self._inbox.get, self._outbox.put),
            daemon=True,
            name="inference",
        ).start()

    def submit(self, request: Request) -> None:
        """See :class:`Worker`."""
        self._inbox.put(request)

    def poll(self, timeout: float = 0.0) -> Answer | None:
        """See :class:`Worker`."""
        try:
            message = self._outbox.get(timeout > 0, timeout)
        except queue.Empty:
            return None
        return message if isinstance(message, Answer) else None

    def ready(self, timeout: float = 0.0) -> bool:
        """See :class:`Worker`."""
        if not self._built:
            try:
                self._built = _is_ready(self._outbox.get(timeout > 0, timeout))
            except queue.Empty:
                return False
        return True

    def restart(self) -> None:
        """See :class:`Worker`."""
        self._inbox.put(None)  # ends the old thread, should it ever come back
        self._start()

    def close(self) -> None:
        """See :class:`Worker`."""
        self._inbox.put(None)


class ProcessWorker:
    """A planner in a process of its own: it can be killed, and shares nothing with the loop but the cores.

    Args:
        build: makes the planner, in the process; it is pickled.
    """

    def __init__(self, build: Callable[[], Planner]) -> None:
        self._build = build
        self._process: Any = None
        self._start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return int(self._process.pid)

    def _start(self) -> None:
        context = process_context()
        self._connection, theirs = context.Pipe()
        self._built = False
        self._process = context.Process(
            target=_process_main, args=(self._build, theirs), daemon=True, name="inference"
        )
        self._process.start()
        theirs.close()

    def submit(self, request: Request) -> None:
        """See :class:`Worker`."""
        try:
            self._connection.send(request)
        except OSError:  # it died; poll says so
            return

    def poll(self, timeout: float = 0.0) -> Answer | None:
        """See :class:`Worker`."""
        try:
            if not self._connection.poll(timeout):
                return None
            message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDiedError("the inference process ended") from error
        return message if isinstance(message, Answer) else None

    def ready(self, timeout: float = 0.0) -> bool:
        """See :class:`Worker`."""
        if not self._built:
            try:
                if not self._connection.poll(timeout):
                    return False
                self._built = _is_ready(self._connection.recv())
            except (EOFError, OSError) as error:
                raise WorkerDiedError("The inference process ended before it was ready.") from error
        return True

    def restart(self) -> None:
        """See :class:`Worker`."""
        self._connection.close()
        self._process.kill()
        self._start()

    def close(self) -> None:
        """See :class:`Worker`."""
        if not self._connection.closed:
            self._connection.close()  # it ends by itself, unless it hangs
            self._process.join(1.0)
            self._process.kill()


def _process_main(build: Callable[[], Planner], connection: Connection) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the loop's to handle

    def receive() -> Any:
        try:
            return connection.recv()
        except EOFError:  # the loop ended
            return None

    try:
        _serve(build, receive, connection.send)
    except (BrokenPipeError, ConnectionResetError):
        return


def process_context() -> Any:
    """How control starts processes: from a clean one that has imported torch, where the platform can."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowpolicy.acceleration.sampler"])
    return context


def _is_ready(message: Any) -> bool:
    if message != _READY:
        raise WorkerDiedError(str(message).rstrip(".") + ".")
    return True


WORKERS: dict[str, Callable[[Callable[[], Planner]], Worker]] = {
    "thread": ThreadWorker,
    "process": ProcessWorker,
}


def build_worker(kind: str, build: Callable[[], Planner]) -> Worker:
    """A worker of a kind: ``thread`` or ``process``."""
    return choose(WORKERS, kind, "inference")(build)
