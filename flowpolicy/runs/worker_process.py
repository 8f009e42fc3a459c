"""A worker process: its start, messages and end; and errors that are passed between processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from flowpolicy import errors
from flowpolicy.errors import FlowPolicyError

END_S = 3.0
"""How long a process is given to end by itself after its pipe was closed; it is then killed."""
FROM_A_TERMINAL = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
)
"""What a terminal sends to all of a program's processes; the parent decides what becomes of its workers."""

Serve = Callable[..., None]
"""The life of a worker: called with its end of the pipe and the worker's arguments; a closed pipe ends it."""


class WorkerDiedError(RuntimeError):
    """The process at the other end of the pipe is gone."""


@dataclass(frozen=True)
class Failure:
    """An error of a worker, in a form that any process can read."""

    sentence: str
    kind: str
    cause: bytes | None
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Describe ``error`` while it is handled."""
        import cloudpickle  # type: ignore[import-untyped]

        known = isinstance(error, FlowPolicyError)
        sentence = str(error) if known else f"A worker process raised {described(error)}."
        try:
            cause = cloudpickle.dumps((error.__cause__ or error) if known else error)
        except Exception:
            cause = None
        return cls(sentence, type(error).__name__, cause, traceback.format_exc())

    def raise_here(self) -> None:
        """Raise it in this process; the first exception is the cause and has the traceback as a note."""
        cause: Any = None
        if self.cause is not None:
            with contextlib.suppress(Exception):  # an exception class may refuse to be rebuilt
                cause = pickle.loads(self.cause)
        if not isinstance(cause, Exception):
            cause = RuntimeError("the error of a worker process")
        cause.add_note(f"In the worker process:\n{self.trace}")
        raise getattr(errors, self.kind, FlowPolicyError)(self.sentence) from cause


class WorkerProcess:
    """A daemon process and this end of its pipe; it may be started again after it was stopped.

    Args:
        serve: what it does; importable from a module, since a worker starts afresh.
        arguments: of ``serve`` after the connection; they are pickled.
        name: of the process.
        preload: modules that a fork server imports once for all workers; what is not installed is left out.
    """

    def __init__(
        self,
        serve: Serve,
        arguments: Sequence[Any] = (),
        *,
        name: str = "worker",
        preload: Sequence[str] = (),
    ) -> None:
        self._serve, self._arguments, self._name = serve, tuple(arguments), name
        self._preload = tuple(preload)
        self._process: Any = None
        self._connection: Connection[Any, Any] | None = None

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self._process.pid)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not ended from here."""
        return self._connection is not None

    def is_alive(self) -> bool:
        """Whether the system still knows the process."""
        return self._process is not None and bool(self._process.is_alive())

    def start(self) -> None:
        """Start the process, and end the one before it."""
        self.stop()
        context = process_context(*self._preload)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_main, args=(self._serve, theirs, self._arguments), daemon=True, name=self._name
        )
        self._process.start()
        theirs.close()  # so that reading here ends when the process does

    def send(self, message: Any) -> None:
        """Hand over a message.

        Raises:
            WorkerDiedError: there is no one to take it.
        """
        self.send_pickled(ForkingPickler.dumps(message))

    def send_pickled(self, content: Any) -> None:
        """Hand over what ``ForkingPickler.dumps`` made of a message; see :meth:`send`."""
        with self._open_pipe() as connection, contextlib.suppress(TypeError):  # closed meanwhile
            connection.send_bytes(content)

    def poll(self, timeout: float = 0.0) -> bool:
        """Whether :meth:`receive` would not wait, waiting at most ``timeout`` seconds for that.

        Raises:
            WorkerDiedError: there will be nothing.
        """
        with self._open_pipe() as connection:
            return connection.poll(timeout)

    def receive(self) -> Any:
        """Wait for the next message, whatever it is; a :class:`Failure` too.

        Raises:
            WorkerDiedError: there will be none.
        """
        with self._open_pipe() as connection:
            return connection.recv()

    @contextlib.contextmanager
    def _open_pipe(self) -> Iterator[Connection[Any, Any]]:
        if self._connection is None:
            raise WorkerDiedError("The process was ended.")
        try:
            yield self._connection
        except (EOFError, OSError) as error:
            raise WorkerDiedError("The process ended.") from error

    def leave(self) -> None:
        """Close the pipe; the process then ends by itself."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def stop(self, seconds: float = END_S) -> int | None:
        """Leave, and kill the process where it takes more than ``seconds``; its exit code (minus a signal's
        number).
        """
        self.leave()
        process, self._process = self._process, None
        if process is None:
            return None
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join(END_S)
        code: int | None = process.exitcode
        with contextlib.suppress(ValueError):  # not even killing helped
            process.close()
        return code


def process_context(*preload: str) -> Any:
    """A start method that is safe beside threads: where the platform can, a fork server with ``preload``."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def leave_to_the_parent() -> None:
    """Ignore what a terminal sends to all of a program's processes."""
    for number in FROM_A_TERMINAL:
        signal.signal(number, signal.SIG_IGN)


def described(error: Exception) -> str:
    """Kind and message of an error, to be put into a sentence."""
    message = str(error).rstrip(". \n")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _main(serve: Serve, connection: Connection[Any, Any], arguments: tuple[Any, ...]) -> None:
    leave_to_the_parent()
    with contextlib.suppress(EOFError, ConnectionError):  # the parent closed the pipe, or is gone
        serve(connection, *arguments)
