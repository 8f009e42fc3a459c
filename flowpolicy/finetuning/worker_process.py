"""One process that runs environments, seen from both of its ends."""

from __future__ import annotations

import contextlib
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import torch

from flowpolicy import errors
from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.parallel import worker_context
from flowpolicy.finetuning.chunk_env import LocalChunks, described, env_error

_CLOSING_SECONDS = 3.0


class WorkerDiedError(Exception):
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
    """Starts, asks and ends a process that runs a ``LocalChunks``.

    Args:
        make_envs: makes its environments, there.
        keys: as ``LocalChunks``.
        obs_horizon: as ``LocalChunks``.
        first: number of its first environment among all.

    Attributes:
        rows: its part of the environments.
        deaths: how often it died since it last answered; counted by the user of this class.
    """

    def __init__(
        self, make_envs: Sequence[Callable[[], Any]], keys: Sequence[str], obs_horizon: int, first: int
    ) -> None:
        self.first = first
        self.rows = slice(first, first + len(make_envs))
        self.deaths = 0
        self._arguments = (cloudpickle.dumps(list(make_envs)), list(keys), obs_horizon, first)
        self._process: Any = None
        self._connection: Connection[Any, Any] | None = None

    def __str__(self) -> str:
        last = self.rows.stop - 1
        return f"environment {self.first}" if last == self.first else f"environments {self.first} to {last}"

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self._process.pid)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not ended from here."""
        return self._connection is not None

    def start(self) -> None:
        """Start the process; it first answers with its spaces, or with the ``Failure`` to make them."""
        self.stop()
        context = worker_context(__name__)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that reading here ends when the process does

    def send(self, message: tuple[str, Any]) -> None:
        """Ask for ``reset`` (of a seed) or ``step`` (of chunks).

        Raises:
            WorkerDiedError: there is no one to ask.
        """
        if self._connection is None:
            raise WorkerDiedError
        try:
            self._connection.send(message)
        except OSError as error:
            raise WorkerDiedError from error

    def receive(self) -> Any:
        """Wait for the next answer: histories of a reset, (ChunkStep, episodes) of a step, or a ``Failure``.

        Raises:
            WorkerDiedError: there will be none.
        """
        if self._connection is None:
            raise WorkerDiedError
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDiedError from error

    def leave(self) -> None:
        """Close the pipe, upon which the process closes its environments and ends."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def stop(self) -> int | None:
        """See the process off, by force where it takes too long; its exit code (minus a signal's number)."""
        self.leave()
        if self._process is None:
            return None
        self._process.join(_CLOSING_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_CLOSING_SECONDS)
        code: int | None = self._process.exitcode
        with contextlib.suppress(ValueError):  # not even killing helped
            self._process.close()
        self._process = None
        return code


def _serve(
    connection: Connection[Any, Any], make_envs: bytes, keys: list[str], obs_horizon: int, first: int
) -> None:
    """The life of a worker process: answer until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes the pipe
    torch.set_num_threads(1)
    chunks: LocalChunks | None = None
    try:
        try:
            envs = []
            for number, make in enumerate(pickle.loads(make_envs), start=first):
                try:
                    envs.append(make())
                except Exception as error:
                    raise env_error(number, "cannot be made, it raised", error) from error
            chunks = LocalChunks(envs, keys, obs_horizon, first_number=first)
        except Exception as error:
            connection.send(Failure.of(error))
            return
        connection.send((chunks.observation_space, chunks.action_space))
        while True:
            connection.send(_answer(chunks, *connection.recv()))
    except (EOFError, ConnectionError):  # the parent closed the pipe, or is gone
        return
    finally:
        if chunks is not None:
            chunks.close()


def _answer(chunks: LocalChunks, command: str, argument: Any) -> Any:
    try:
        if command == "reset":
            return chunks.reset(argument)
        return chunks.step(argument), chunks.pop_episodes()
    except Exception as error:
        return Failure.of(error)
