"""Environments that execute whole action chunks: what they answer, and the ones that live in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from flowpolicy.errors import FlowPolicyError, TaskError
from flowpolicy.evaluation.environment import Fields, boxes_of, fields_of, standard
from flowpolicy.evaluation.episodes import EpisodeRecord, EpisodeTally
from flowpolicy.execution.history import Histories, HistoryBuffer
from flowpolicy.finetuning.cloning import ClonedStates, clone, restore, why_not_cloneable
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.runs.worker_process import described
from flowpolicy.settings import require


@dataclass(frozen=True)
class ChunkStep:
    """What N environments answered to N chunks of at most T_e actions.

    Attributes:
        observation: key -> ``(N, T_o, *shape)``, what the next chunk is sampled from, oldest first; of the
            new episode where one ended.
        final_observation: the same, but of the old episode's true end where one ended; the very arrays of
            ``observation`` where none did.
        rewards: ``(N, T_e)`` per environment step, 0 after the last executed one.
        executed: ``(N,)`` environment steps executed.
        terminated: ``(N,)``, the episode ended in a terminal state.
        truncated: ``(N,)``, it was ended by a time limit or with its process; never both.
        success: ``(N,)``, the environment said so at any step of the chunk.
        restarted: ``(N,)``, what ended is no whole episode: the environment's process died in this call and
            was replaced, or it was put to another state.
    """

    observation: Histories
    final_observation: Histories
    rewards: NDArray[np.float32]
    executed: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    success: NDArray[np.bool_]
    restarted: NDArray[np.bool_]


class ChunkEnv(Protocol):
    """N environments that take a chunk each and answer when all chunks are executed.

    A chunk is executed action after action until it is used up or the episode ends; an ended episode is
    followed by a new one, which waits for its first chunk. The first observation of an episode fills
    the whole history. Floating-point observations are float32, and actions are clipped to the action space.
    """

    @property
    def num_envs(self) -> int:
        """Environments, N."""

    @property
    def observation_space(self) -> Any:
        """Gymnasium space of one environment's observation."""

    @property
    def action_space(self) -> Any:
        """Gymnasium space (a Box) of one environment's action."""

    def reset(self, seed: int | None = None) -> Histories:
        """Start an episode everywhere; resets with different seeds start different ones."""

    def step(self, chunks: NDArray[Any]) -> ChunkStep:
        """Execute ``chunks``, ``(N, T_e, A)`` in physical units.

        Raises:
            FlowPolicyError: an action, an observation or a reward is not finite, an environment failed, or
                there was no ``reset`` since the last error.
        """

    def pop_episodes(self) -> list[EpisodeRecord]:
        """The episodes that ended since the last call of this, whole ones, however many chunks they took."""

    def close(self) -> None:
        """Close every environment; may be called again."""


Answer = TypeVar("Answer")
Played = tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]
"""Of each environment: steps executed, whether it was terminated, whether truncated, whether it succeeded."""


class LocalChunks:
    """Environments in this process, one after the other; a :class:`ChunkEnv`.

    Args:
        envs: Gymnasium environments with equal spaces; each is brought into the form of
            :class:`~flowpolicy.evaluation.environment.StandardEnvironment`.
        keys: observation keys to keep; a Box observation has the one key ``observation``.
        obs_horizon: observations in a history, T_o.
        first_number: of the first environment among all, in messages and for its seed.

    Raises:
        TaskError: the spaces do not fit.
    """

    def __init__(
        self, envs: Sequence[Any], keys: Sequence[str], obs_horizon: int, *, first_number: int = 0
    ) -> None:
        require(len(envs) >= 1, "envs", envs, "at least one environment")
        self.envs = [standard(env) for env in envs]
        self.num_envs = len(self.envs)
        self.observation_space = self.envs[0].observation_space
        self.action_space: spaces.Box = self.envs[0].action_space
        fields = kept_fields(self.observation_space, keys, obs_horizon)
        for env in self.envs:
            check_equal(fields, self.action_space, env.observation_space, env.action_space)
        self.envs = [env.keeping(keys) for env in self.envs]
        self._history = HistoryBuffer(fields, self.num_envs, obs_horizon)
        self._first_number = first_number
        self._tally = EpisodeTally(self.num_envs)
        self._ready = False

    def reset(self, seed: int | None = None) -> Histories:
        """See :meth:`ChunkEnv.reset`."""
        require_open(bool(self.envs))
        self._ready = False
        self._tally.restart()
        first = None if seed is None else derived_seed(seed, "environments") + self._first_number
        for row in range(self.num_envs):
            self._start_episode(row, None if first is None else first + row)
        self._ready = True
        return self._history.copy()

    def step(self, chunks: NDArray[Any]) -> ChunkStep:
        """See :meth:`ChunkEnv.step`."""
        require_ready(self._ready)
        actions = checked_chunks(chunks, self.num_envs, self.action_space, self._first_number)
        actions = self.envs[0].bounded(actions)
        self._ready = False  # until this call has gone through
        tape = self._history.tape(actions.shape[1])
        rewards = np.zeros(actions.shape[:2])
        executed, terminated, over, success = self._execute(actions, tape, rewards)
        truncated = over & ~terminated
        ended = terminated | truncated
        rewards32 = rewards.astype(np.float32)
        check_finite(rewards32, "a reward", self._first_number)
        for key, rows in tape.items():
            check_finite(rows, f"an observation '{key}'", self._first_number)
        for row, total in enumerate(rewards.sum(axis=1).tolist()):
            self._tally.running[row].ret += total
            self._tally.running[row].length += int(executed[row])
        self._history.wind(tape, executed)
        final = self._history.copy()
        for row in np.flatnonzero(ended).tolist():
            self._tally.end(row)
            self._start_episode(row, None)
        self._ready = True
        return ChunkStep(
            observation=self._history.copy() if ended.any() else final,
            final_observation=final,
            rewards=rewards32,
            executed=executed,
            terminated=terminated,
            truncated=truncated,
            success=success,
            restarted=np.zeros(self.num_envs, dtype=bool),
        )

    def pop_episodes(self) -> list[EpisodeRecord]:
        """See :meth:`ChunkEnv.pop_episodes`."""
        return self._tally.pop()

    def why_not_restorable(self) -> str:
        """See :class:`~flowpolicy.finetuning.branching.Restorable`."""
        return next(filter(None, map(why_not_cloneable, self.envs)), "")

    def states(self) -> Any:
        """Where all environments stand now, N rows; see :class:`~flowpolicy.finetuning.branching.Restorable`.

        Raises:
            FlowPolicyError: there was no ``reset`` since the last error, or an environment failed.
        """
        require_ready(self._ready)
        return ClonedStates(
            [self._asked(row, partial(clone, self.envs[row])) for row in range(self.num_envs)],
            self._history.copy(),
        )

    def reset_to(self, states: Any, rows: Sequence[int] | None = None) -> Histories:
        """Go on from ``states``, one for each of the environments ``rows`` (None: all); returns and lengths
        count from there.

        The episodes after those are drawn by each environment's own generator, as :meth:`reset` seeded it.

        Returns:
            Histories of all environments.

        Raises:
            FlowPolicyError: there are more or fewer of them, there was no ``reset`` since the last error, or
                an environment failed.
        """
        require_ready(self._ready)
        chosen = chosen_rows(states, rows, self.num_envs)
        self._ready = False  # until this call has gone through
        self._restore(states, chosen)
        self._history.put(states.histories, chosen)
        self._tally.restart(chosen)
        self._ready = True
        return self._history.copy()

    def _restore(self, states: Any, rows: Sequence[int]) -> None:
        """Put the simulators of ``rows`` to the states."""
        for row, state in zip(rows, states.envs, strict=True):
            self._asked(row, partial(restore, self.envs[row], state))

    def close(self) -> None:
        """See :meth:`ChunkEnv.close`."""
        self._ready = False
        while self.envs:
            self.envs.pop().close()

    def _execute(self, actions: NDArray[Any], tape: Histories, rewards: NDArray[np.float64]) -> Played:
        """Execute chunks ``(N, T_e, A)``; observations are written behind the histories of the tape."""
        played = [self._play(row, actions[row], tape, rewards[row]) for row in range(self.num_envs)]
        executed, *said = zip(*played, strict=True)
        terminated, truncated, success = np.array(said, dtype=bool)
        return np.array(executed, dtype=np.int64), terminated, truncated, success

    def _play(
        self, row: int, actions: NDArray[Any], tape: Histories, rewards: NDArray[np.float64]
    ) -> tuple[int, bool, bool, bool]:
        """Execute one chunk; steps executed, terminated, truncated, success.

        This is the hot path: a simulator's step may take no more than 100 us.
        """
        step, judge = self.envs[row].step_bounded, self._tally.running[row].judge
        kept = [(key, rows[row, self._history.obs_horizon :]) for key, rows in tape.items()]
        success = False
        at, terminated, truncated = -1, False, False
        try:
            for at, action in enumerate(actions):
                observation, rewards[at], terminated, truncated, info = step(action)
                for key, rows in kept:
                    rows[at] = observation[key]
                if info:
                    judge(info)
                    success = success or bool(info.get("success"))
                if terminated or truncated:
                    break
        except Exception as error:
            raise env_error(self._first_number + row, "raised", error) from error
        return at + 1, bool(terminated), bool(truncated), success

    def _asked(self, row: int, question: Callable[[], Answer]) -> Answer:
        """What an environment answers; an error of it says which one it is."""
        try:
            return question()
        except FlowPolicyError:
            raise
        except Exception as error:
            raise env_error(self._first_number + row, "raised", error) from error

    def _start_episode(self, row: int, seed: int | None) -> None:
        """Reset an environment; its first observation fills its history."""
        first, _ = self._asked(row, partial(self.envs[row].reset, seed=seed))
        for key in self._history.arrays:
            check_finite(first[key][None], f"an observation '{key}'", self._first_number + row)
        self._history.restart(row)
        self._history.add({key: first[key][None] for key in self._history.arrays}, [row])


def kept_fields(observation_space: Any, keys: Sequence[str], obs_horizon: int) -> Fields:
    """Shapes and dtypes of the observations ``keys``.

    Raises:
        TaskError: there is no such observation.
        ConfigError: a history of no observations.
    """
    require(obs_horizon >= 1, "obs_horizon", obs_horizon, "at least 1")
    fields = fields_of(boxes_of(observation_space))
    for key in keys:
        if key not in fields:
            raise TaskError(
                f"The environment has no observation '{key}' that is an array "
                f"(it has {', '.join(sorted(fields))}); choose the task that the policy was trained for."
            )
    return {key: fields[key] for key in keys}


def check_equal(fields: Fields, action_space: Any, other_observations: Any, other_actions: Any) -> None:
    """Refuse (TaskError) the spaces of another environment unless they are these."""
    boxes = boxes_of(other_observations)
    same = all(key in boxes and tuple(boxes[key].shape) == shape for key, (shape, _) in fields.items())
    if not same or other_actions != action_space:
        raise TaskError(
            "The environments differ in their observation shapes or action spaces; "
            "give environments of one task."
        )


def checked_chunks(
    chunks: NDArray[Any], num_envs: int, action_space: spaces.Box, first_number: int = 0
) -> NDArray[Any]:
    """Refuse (FlowPolicyError) chunks of a wrong shape, or with NaN or infinity."""
    chunks = np.asarray(chunks)
    expected = (num_envs, chunks.shape[1] if chunks.ndim == 3 else "T_e", *action_space.shape)
    if chunks.shape != expected or 0 in chunks.shape:
        raise FlowPolicyError(
            f"The chunks have the shape {chunks.shape}; {num_envs} environments need "
            f"({num_envs}, T_e, {action_space.shape[0]}) with T_e >= 1."
        )
    if not np.isfinite(chunks).all():
        raise FlowPolicyError(
            f"The chunk for environment {first_number + _first_bad_row(chunks)} has an action with NaN or "
            "infinity; the policy diverged, so go back to an earlier checkpoint and lower the learning rate."
        )
    return chunks


def check_finite(rows: NDArray[Any], what: str, first_number: int = 0) -> None:
    """Refuse (FlowPolicyError) NaN or infinity in ``rows``, ``(N, ...)``, naming the environment."""
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        raise FlowPolicyError(
            f"Environment {first_number + _first_bad_row(rows)} gave {what} with NaN or infinity; check the "
            "simulator (an unstable contact or a too large action does this)."
        )


def _first_bad_row(rows: NDArray[Any]) -> int:
    return int(np.argmin(np.isfinite(rows).reshape(len(rows), -1).all(axis=1)))


def copied(histories: Mapping[str, NDArray[Any]]) -> Histories:
    """A copy that shares no array."""
    return {key: array.copy() for key, array in histories.items()}


def require_ready(ready: bool) -> None:
    """Refuse (FlowPolicyError) a step before the first reset, after an error, or after closing."""
    if not ready:
        raise FlowPolicyError(
            "The environments are in no known state (never reset, stopped by an error, or closed); "
            "call reset() before step()."
        )


def require_open(is_open: bool) -> None:
    """Refuse (FlowPolicyError) a reset after closing."""
    if not is_open:
        raise FlowPolicyError("The environments are closed; make new ones.")


def chosen_rows(states: Sized, rows: Sequence[int] | None, num_envs: int) -> list[int]:
    """The environments, all or ``rows``, to put to as many states; others are refused (FlowPolicyError)."""
    chosen = [int(row) for row in (range(num_envs) if rows is None else rows)]
    if len(states) != len(chosen):
        raise FlowPolicyError(
            f"There are {len(states)} states for {len(chosen)} environments; choose one for each with "
            "states.rows(index)."
        )
    if unknown := [row for row in chosen if not 0 <= row < num_envs]:
        raise FlowPolicyError(f"There is no environment {unknown[0]}; they are numbered 0 to {num_envs - 1}.")
    return chosen


def env_error(number: int, doing: str, error: Exception) -> FlowPolicyError:
    """What environment ``number`` raised, as one sentence that names it; to be raised from ``error``."""
    return FlowPolicyError(
        f"Environment {number} {doing} {described(error)}; fix the environment, "
        "then call reset() or start again."
    )
