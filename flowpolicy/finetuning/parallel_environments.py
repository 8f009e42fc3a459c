"""Whole action chunks in environments that are spread over processes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.episodes import EpisodeRecord
from flowpolicy.execution.history import Histories
from flowpolicy.finetuning.cloning import ClonedStates
from flowpolicy.finetuning.environments import (
    ChunkStep,
    LocalChunks,
    check_equal,
    checked_chunks,
    chosen_rows,
    copied,
    env_error,
    kept_fields,
    require_open,
    require_ready,
)
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.runs.worker_process import Failure, WorkerDiedError, WorkerProcess
from flowpolicy.settings import require

MAX_RESTARTS = 10
"""Times in a row that a worker may die without answering a call."""

_log = logging.getLogger(__name__)


class WorkerChunks:
    """Environments in other processes; a :class:`flowpolicy.finetuning.environments.ChunkEnv`.

    Each process runs a consecutive part of the environments as a ``LocalChunks``: one message with the
    chunks of a call, one answer. A process that dies (killed, out of memory, a crash in the simulator)
    is replaced, and its environments begin new episodes. Their rows of that call say ``executed`` = 0,
    truncated and restarted, and ``final_observation`` is what the chunk was sampled from; the episodes
    lost are in no statistics. Processes are daemons and end with this one. Ctrl-C ends them too; the next
    ``reset`` starts them again.

    Args:
        make_envs: one callable per environment; closures and lambdas will do.
        num_workers: processes, at most one per environment.
        keys: observation keys to keep; a Box observation has the one key ``observation``.
        obs_horizon: observations in a history, T_o.

    Attributes:
        restarts: processes replaced since construction.

    Raises:
        TaskError: the spaces do not fit.
        FlowPolicyError: an environment cannot be made.
    """

    def __init__(
        self,
        make_envs: Sequence[Callable[[], Any]],
        num_workers: int,
        keys: Sequence[str],
        obs_horizon: int,
    ) -> None:
        require(len(make_envs) >= 1, "make_envs", make_envs, "at least one callable")
        require(num_workers >= 1, "num_workers", num_workers, "at least 1")
        self.num_envs = len(make_envs)
        self.restarts = 0
        self._ready, self._open = False, True
        self._seed: int | None = None
        self._history: Histories = {}
        self._episodes: list[EpisodeRecord] = []
        num_workers = min(num_workers, self.num_envs)
        edges = [self.num_envs * part // num_workers for part in range(num_workers + 1)]
        self._workers = [
            _Worker(make_envs[first:last], keys, obs_horizon, first)
            for first, last in itertools.pairwise(edges)
        ]
        try:
            offered = self._start_missing()
            self.observation_space, self.action_space = offered[0]
            fields = kept_fields(self.observation_space, keys, obs_horizon)
            for other in offered:
                check_equal(fields, self.action_space, *other)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, in the order of their environments."""
        return [worker.pid for worker in self._workers]

    def reset(self, seed: int | None = None) -> Histories:
        """See :meth:`ChunkEnv.reset`."""
        require_open(self._open)
        self._ready = False
        self._seed = seed
        with self._ending_workers_on_interrupt():
            self._start_missing()
            answers = self._exchange("reset", self._workers, [(seed,)] * len(self._workers))
            parts = [
                self._replace(worker) if answer is None else answer
                for worker, answer in zip(self._workers, answers, strict=True)
            ]
        self._history = _joined(parts)
        self._ready = True
        return copied(self._history)

    def step(self, chunks: NDArray[Any]) -> ChunkStep:
        """See :meth:`ChunkEnv.step`.

        Raises:
            FlowPolicyError: also when a process died more than ``MAX_RESTARTS`` times in a row.
        """
        require_ready(self._ready)
        actions = checked_chunks(chunks, self.num_envs, self.action_space)
        self._ready = False
        parts = []
        with self._ending_workers_on_interrupt():
            questions = [(actions[worker.rows],) for worker in self._workers]
            answers = self._exchange("step", self._workers, questions)
            for worker, answer in zip(self._workers, answers, strict=True):
                if answer is None:
                    before = {key: history[worker.rows] for key, history in self._history.items()}
                    parts.append(_lost(before, self._replace(worker), actions.shape[1]))
                else:
                    part, episodes = answer
                    parts.append(part)
                    self._episodes += episodes
                    worker.deaths = 0
        merged = _merged(parts)
        self._history = copied(merged.observation)
        self._ready = True
        return merged

    def why_not_restorable(self) -> str:
        """See :class:`~flowpolicy.finetuning.branching.Restorable`."""
        answers = self._asked("why_not_restorable", self._workers, [()] * len(self._workers))
        return next(filter(None, answers), "")

    def states(self) -> ClonedStates:
        """Where all environments stand now, N rows.

        Raises:
            FlowPolicyError: there was no ``reset`` since the last error, an environment failed, or a process
                died.
        """
        require_ready(self._ready)
        return ClonedStates.joined(self._asked("states", self._workers, [()] * len(self._workers)))

    def reset_to(self, states: ClonedStates, rows: Sequence[int] | None = None) -> Histories:
        """See :meth:`LocalChunks.reset_to`.

        Raises:
            FlowPolicyError: as there, or a process died.
        """
        require_ready(self._ready)
        chosen = np.array(chosen_rows(states, rows, self.num_envs))
        self._ready = False  # until this call has gone through
        workers, questions = [], []
        for worker in self._workers:
            mine = np.flatnonzero((chosen >= worker.rows.start) & (chosen < worker.rows.stop))
            if mine.size:
                workers.append(worker)
                questions.append((states.rows(mine), (chosen[mine] - worker.first).tolist()))
        for worker, histories in zip(workers, self._asked("reset_to", workers, questions), strict=True):
            for key, array in histories.items():
                self._history[key][worker.rows] = array
        self._ready = True
        return copied(self._history)

    def pop_episodes(self) -> list[EpisodeRecord]:
        """See :meth:`ChunkEnv.pop_episodes`."""
        episodes, self._episodes = self._episodes, []
        return episodes

    def close(self) -> None:
        """End the processes; one that does not close its environments in a few seconds is killed."""
        self._ready = self._open = False
        self._stop_all()

    def _stop_all(self) -> None:
        for worker in self._workers:
            worker.leave()
        for worker in self._workers:
            worker.stop()

    @contextlib.contextmanager
    def _ending_workers_on_interrupt(self) -> Iterator[None]:
        """After Ctrl-C, a pipe may hold half a message; so no worker is asked again."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self._stop_all()
            raise

    def _start_missing(self) -> list[Any]:
        """Start the workers that do not run, side by side; the spaces they offer."""
        missing = [worker for worker in self._workers if not worker.is_running]
        for worker in missing:
            worker.deaths = 0
            worker.start()
        offered = []
        for worker in missing:
            try:
                offered.append(worker.receive())
            except WorkerDiedError:
                raise FlowPolicyError(
                    f"The process of {worker} died with exit code {worker.stop()} while making them; check "
                    "that one can be made in a fresh Python process, and that the memory suffices."
                ) from None
        _raise_failures(offered)
        return offered

    def _asked(
        self, command: str, workers: Sequence[_Worker], questions: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """The answers of workers of which none may die."""
        with self._ending_workers_on_interrupt():
            answers = self._exchange(command, workers, questions)
        for worker, answer in zip(workers, answers, strict=True):
            if answer is None:
                self._ready = False
                raise FlowPolicyError(
                    f"The process of {worker} died; call reset(), or go on from the last checkpoint."
                )
        return answers

    def _exchange(
        self, command: str, workers: Sequence[_Worker], questions: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """Send each worker its arguments, and wait for all; the answers, None of a worker that died."""
        for worker, arguments in zip(workers, questions, strict=True):
            with contextlib.suppress(WorkerDiedError):  # receiving will find it dead
                worker.ask(command, *arguments)
        answers: list[Any] = []
        for worker in workers:
            try:
                answers.append(worker.receive())
            except WorkerDiedError:
                worker.leave()
                answers.append(None)
        _raise_failures(answers)
        return answers

    def _replace(self, worker: _Worker) -> Histories:
        """Start new processes for a dead one until one resets its environments; their first histories."""
        while True:
            code = worker.stop()
            worker.deaths += 1
            if worker.deaths > MAX_RESTARTS:
                raise FlowPolicyError(
                    f"The process of {worker} died {worker.deaths} times in a row (exit code {code}); run "
                    "one of them alone to find the crash, or give the machine more memory or fewer workers."
                )
            self.restarts += 1
            _log.warning(
                "The process of %s died (exit code %s), so their episodes are lost and new ones begin in a "
                "new process (restart %d).",
                worker,
                code,
                self.restarts,
            )
            worker.start()
            try:
                _raise_failures([worker.receive()])
                worker.ask("reset", self._fresh_seed())
                answer = worker.receive()
            except WorkerDiedError:
                continue
            _raise_failures([answer])
            histories: Histories = answer
            return histories

    def _fresh_seed(self) -> int | None:
        """A seed for replaced environments: repeatable, and not the one that led to the crash."""
        if self._seed is None:
            return None
        return derived_seed(self._seed, "restart", self.restarts)


class _Worker(WorkerProcess):
    """A process that runs consecutive environments as a ``LocalChunks``.

    It first answers with its spaces; then as ``LocalChunks``, to a step with the episodes that ended too.

    Attributes:
        rows: its part of the environments.
        deaths: how often it died since it last answered.
    """

    def __init__(
        self, make_envs: Sequence[Callable[[], Any]], keys: Sequence[str], obs_horizon: int, first: int
    ) -> None:
        arguments = (cloudpickle.dumps(list(make_envs)), list(keys), obs_horizon, first)
        super().__init__(_serve, arguments, name="environments", preload=("__main__", __name__))
        self.first, self.rows, self.deaths = first, slice(first, first + len(make_envs)), 0

    def ask(self, command: str, *arguments: Any) -> None:
        """Send a question, a method of ``LocalChunks`` and its arguments."""
        self.send((command, arguments))

    def __str__(self) -> str:
        last = self.rows.stop - 1
        return f"environment {self.first}" if last == self.first else f"environments {self.first} to {last}"


def _serve(
    connection: Connection[Any, Any], make_envs: bytes, keys: list[str], obs_horizon: int, first: int
) -> None:
    """The life of a worker: answer until the pipe is closed."""
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
            answer = _answer(chunks, *connection.recv())
            try:
                connection.send(answer)
            except (TypeError, AttributeError, pickle.PicklingError) as error:  # nothing has been sent
                connection.send(Failure.of(error))
    finally:
        if chunks is not None:
            chunks.close()


def _answer(chunks: LocalChunks, command: str, arguments: tuple[Any, ...]) -> Any:
    try:
        answer = getattr(chunks, command)(*arguments)
        return (answer, chunks.pop_episodes()) if command == "step" else answer
    except Exception as error:
        return Failure.of(error)


def _raise_failures(answers: Sequence[Any]) -> None:
    for answer in answers:
        if isinstance(answer, Failure):
            answer.raise_here()


def _lost(before: Histories, after: Histories, steps: int) -> ChunkStep:
    """The rows of a worker that died: nothing was executed, and new episodes begin."""
    count = len(next(iter(before.values())))
    yes, no = np.ones(count, dtype=bool), np.zeros(count, dtype=bool)
    return ChunkStep(
        observation=after,
        final_observation=before,
        rewards=np.zeros((count, steps), dtype=np.float32),
        executed=np.zeros(count, dtype=np.int64),
        terminated=no,
        truncated=yes,
        success=no,
        restarted=yes,
    )


def _joined(parts: Sequence[Histories]) -> Histories:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _merged(parts: Sequence[ChunkStep]) -> ChunkStep:
    """One step of all environments from those of the workers."""
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(ChunkStep):
        values = [getattr(part, field.name) for part in parts]
        columns[field.name] = _joined(values) if isinstance(values[0], dict) else np.concatenate(values)
    return ChunkStep(**columns)
