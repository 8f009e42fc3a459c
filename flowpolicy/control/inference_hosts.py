"""The thread or process in which a sampler is built and answers requests."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import FlowPolicyError
from flowpolicy.execution.fusion import Prefix
from flowpolicy.runs.worker_process import WorkerDiedError, WorkerProcess

THREAD_END_S, PROCESS_END_S = 5.0, 1.0
"""Seconds that a host has to end by itself; after that a process is killed, a thread left behind."""
UNBLOCKED_BYTES = 1 << 15
"""A request of this size fits into a pipe that nobody reads from."""


@dataclass(frozen=True)
class Request:
    """What a chunk is sampled from.

    Attributes:
        step: actions executed before the newest observation.
        observation: key -> ``(T_o, *shape)``, oldest first, physical units.
        prefix: what the chunk should agree with, or None.
    """

    step: int
    observation: dict[str, NDArray[Any]]
    prefix: Prefix | None = None


@dataclass(frozen=True)
class Answer:
    """The result of a request.

    Attributes:
        step: of the request.
        actions: the chunk ``(T, A)`` in physical units, unchecked; None where the policy raised.
        seconds: inference time.
        error: the exception in one line.
    """

    step: int
    actions: NDArray[np.float32] | None
    seconds: float
    error: str = ""


Inference = Callable[[Request], NDArray[np.float32]]
"""From a request to a chunk ``(T, A)``. Its optional attribute ``again`` builds another one faster, and
``close`` is called when it has answered its last request."""
Build = Callable[[], Inference]


class Host(Protocol):
    """One sampler in a thread or process of its own; it takes one request at a time."""

    again: Build | None
    """Known once built: a faster way to build the next one; None if there is none."""

    @property
    def pid(self) -> int:
        """Process ID."""
        ...

    def submit(self, request: Request) -> None:
        """See :class:`flowpolicy.control.inference.Worker`."""
        ...

    def poll(self, timeout: float = 0.0) -> Answer | None:
        """See :class:`flowpolicy.control.inference.Worker`."""
        ...

    def built(self, timeout: float) -> bool:
        """Whether the sampler is built, waiting at most ``timeout`` seconds for it.

        Raises:
            WorkerDiedError: it cannot be built.
        """
        ...

    def alive(self) -> bool:
        """Whether it is still running."""
        ...

    def end(self, now: bool = False) -> None:
        """End it; unless ``now``, it first gets some time to end by itself."""
        ...


@dataclass(frozen=True)
class _Ready:
    again: Build | None


def _serve(build: Build, receive: Callable[[], Any], send: Callable[[Any], None]) -> None:
    """Build a sampler and answer requests until None comes."""
    try:
        infer = build()
    except Exception as error:
        send(f"{type(error).__name__}: {error}" if not isinstance(error, FlowPolicyError) else str(error))
        return
    send(_Ready(getattr(infer, "again", None)))
    while (request := receive()) is not None:
        started = time.perf_counter()
        try:
            actions = np.asarray(infer(request), dtype=np.float32)
            answer = Answer(request.step, actions, time.perf_counter() - started)
        except Exception as error:  # a policy may raise anything; the loop gets the error and goes on
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            answer = Answer(request.step, None, time.perf_counter() - started, line)
        send(answer)
    getattr(infer, "close", lambda: None)()


class InferenceThread:
    """A sampler in a thread of this process. A thread cannot be ended by force."""

    def __init__(self, build: Build) -> None:
        self.again: Build | None = None
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_serve, args=(build, self._inbox.get, self._outbox.put), daemon=True, name="inference"
        )
        self._thread.start()

    @property
    def pid(self) -> int:
        """See :class:`Host`."""
        return os.getpid()

    def submit(self, request: Request) -> None:
        """See :class:`Host`."""
        self._inbox.put(request)

    def poll(self, timeout: float = 0.0) -> Answer | None:
        """See :class:`Host`."""
        try:
            message = self._outbox.get(timeout > 0, timeout)
        except queue.Empty:
            return None
        return message if isinstance(message, Answer) else None

    def built(self, timeout: float) -> bool:
        """See :class:`Host`."""
        try:
            self.again = _again(self._outbox.get(timeout > 0, timeout))
        except queue.Empty:
            return False
        return True

    def alive(self) -> bool:
        """See :class:`Host`."""
        return self._thread.is_alive()

    def end(self, now: bool = False) -> None:
        """See :class:`Host`."""
        self._inbox.put(None)  # it ends once the call under way returns
        self._thread.join(0.0 if now else THREAD_END_S)


class InferenceProcess:
    """A sampler in a process.

    Args:
        build: makes the sampler, in the process; it is pickled.
    """

    def __init__(self, build: Build) -> None:
        self.again: Build | None = None
        self._worker = WorkerProcess(_process_main, (build,), name="inference", preload=PRELOAD)
        self._worker.start()

    @property
    def pid(self) -> int:
        """See :class:`Host`."""
        return self._worker.pid

    def submit(self, request: Request) -> None:
        """See :class:`Host`."""
        content = ForkingPickler.dumps(request)
        if len(content) <= UNBLOCKED_BYTES:
            self._send(content)
        else:  # images: a process that is stopped would not take them, and the caller must not wait
            threading.Thread(
                target=self._send, args=(content,), daemon=True, name="inference request"
            ).start()

    def _send(self, content: Any) -> None:
        with suppress(WorkerDiedError):  # as poll says
            self._worker.send_pickled(content)

    def poll(self, timeout: float = 0.0) -> Answer | None:
        """See :class:`Host`."""
        try:
            message = self._worker.receive() if self._worker.poll(timeout) else None
        except WorkerDiedError as error:
            raise WorkerDiedError("the inference process ended") from error
        return message if isinstance(message, Answer) else None

    def built(self, timeout: float) -> bool:
        """See :class:`Host`."""
        try:
            if not self._worker.poll(timeout):
                return False
            message = self._worker.receive()
        except WorkerDiedError as error:
            raise WorkerDiedError("The inference process ended before it was ready.") from error
        self.again = _again(message)
        return True

    def alive(self) -> bool:
        """See :class:`Host`."""
        return self._worker.is_alive()

    def end(self, now: bool = False) -> None:
        """See :class:`Host`."""
        self._worker.stop(0.0 if now else PROCESS_END_S)


def _process_main(connection: Connection[Any, Any], build: Build) -> None:
    def receive() -> Any:
        try:
            return connection.recv()
        except EOFError:  # the loop ended
            return None

    _serve(build, receive, connection.send)


PRELOAD = ("flowpolicy.control.policy_inference", "onnx", "onnx.helper", "onnxruntime")
"""What the processes of control need, imported once; what is not installed is left out."""


def _again(message: Any) -> Build | None:
    """The ``again`` in the first message of a host.

    Raises:
        WorkerDiedError: the sampler could not be built.
    """
    if not isinstance(message, _Ready):
        raise WorkerDiedError(str(message).rstrip(".") + ".")
    return message.again
