"""Environments that execute whole action chunks: what they answer, and the ones that live in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import FlowPolicyError
from flowpolicy.finetuning.chunk_spaces import ChunkSpaces, Histories, check_finite, copied
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.settings import require


@dataclass(frozen=True)
class ChunkStep:
    """What N environments answered to N chunks of at most T_e actions.

    Attributes:
        observation: key -> ``(N, T_o, *shape)``, what the next chunk is planned from, oldest first; of the
            new episode where one ended.
        final_observation: the same, but of the old episode's true end where one ended; the very arrays of
            ``observation`` where none did.
        rewards: ``(N, T_e)`` per environment step, 0 after the last executed one.
        executed: ``(N,)`` environment steps executed.
        terminated: ``(N,)``, the episode ended in a terminal state.
        truncated: ``(N,)``, it was ended by a time limit or with its process; never both.
        success: ``(N,)``, the environment said so at any step of the chunk.
        restarted: ``(N,)``, the environment's process died in this call and was replaced.
    """

    observation: Histories
    final_observation: Histories
    rewards: NDArray[np.float32]
    executed: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    success: NDArray[np.bool_]
    restarted: NDArray[np.bool_]


@dataclass(frozen=True)
class EpisodeRecord:
    """One whole episode.

    Attributes:
        ret: its return, the undiscounted sum of its rewards.
        length: its environment steps.
        success: whether ``info["success"]`` was ever true; None where the environment has no such entry.
    """

    ret: float
    length: int
    success: bool | None


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


class LocalChunks:
    """Environments in this process, one after the other; a :class:`ChunkEnv`.

    Args:
        envs: Gymnasium environments with equal spaces: actions a flat Box, observations a Box (its key is
            ``observation``) or a Dict.
        keys: observation keys to keep.
        obs_horizon: observations in a history, T_o.
        first_number: of the first environment among all, in messages and for its seed.

    Raises:
        TaskError: the spaces do not fit.
    """

    def __init__(
        self, envs: Sequence[Any], keys: Sequence[str], obs_horizon: int, *, first_number: int = 0
    ) -> None:
        require(len(envs) >= 1, "envs", envs, "at least one environment")
        self.envs = list(envs)
        self.num_envs = len(self.envs)
        self.observation_space = self.envs[0].observation_space
        self.action_space = self.envs[0].action_space
        self._spaces = ChunkSpaces(self.observation_space, self.action_space, keys, obs_horizon)
        for env in self.envs:
            self._spaces.check_equal(env.observation_space, env.action_space)
        self._first_number = first_number
        self._tally = EpisodeTally(self.num_envs)
        self._history: Histories = {}
        self._ready = False

    def reset(self, seed: int | None = None) -> Histories:
        """See :meth:`ChunkEnv.reset`."""
        require_open(bool(self.envs))
        self._ready = False
        self._tally.restart()
        self._history = self._spaces.tape(self.num_envs, 0)
        first = None if seed is None else derived_seed(seed, "environments") + self._first_number
        for row in range(self.num_envs):
            self._begin(row, self._history, None if first is None else first + row)
        self._ready = True
        return copied(self._history)

    def step(self, chunks: NDArray[Any]) -> ChunkStep:
        """See :meth:`ChunkEnv.step`."""
        require_ready(self._ready)
        actions = self._spaces.bounded(chunks, self.num_envs, self._first_number)
        self._ready = False  # until this call has gone through
        horizon = self._spaces.obs_horizon
        tape = self._spaces.tape(self.num_envs, actions.shape[1])
        for key, rows in tape.items():
            rows[:, :horizon] = self._history[key]
        rewards = np.zeros(actions.shape[:2])
        played = [self._play(row, actions[row], tape, rewards[row]) for row in range(self.num_envs)]
        steps, terminal, over, succeeded = zip(*played, strict=True)
        self._tally.add(rewards.sum(axis=1).tolist(), steps, succeeded)
        executed = np.array(steps, dtype=np.int64)
        terminated = np.array(terminal, dtype=bool)
        truncated = np.array(over, dtype=bool) & ~terminated
        success = np.array(succeeded, dtype=bool)  # None, never said, is no success
        ended = terminated | truncated
        rewards32 = rewards.astype(np.float32)
        check_finite(rewards32, "a reward", self._first_number)
        for key, rows in tape.items():
            check_finite(rows, f"an observation '{key}'", self._first_number)
        window = executed[:, None] + np.arange(horizon)
        final = {key: rows[np.arange(self.num_envs)[:, None], window] for key, rows in tape.items()}
        observation = copied(final) if ended.any() else final
        for row in np.flatnonzero(ended).tolist():
            self._tally.end(row)
            self._begin(row, observation, None)
        self._history = copied(observation)
        self._ready = True
        return ChunkStep(
            observation=observation,
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

    def close(self) -> None:
        """See :meth:`ChunkEnv.close`."""
        self._ready = False
        while self.envs:
            self.envs.pop().close()

    def _play(
        self, row: int, actions: NDArray[Any], tape: Histories, rewards: NDArray[np.float64]
    ) -> tuple[int, bool, bool, bool | None]:
        """Execute one chunk; steps executed, terminated, truncated, success (None: never said).

        This is the hot path: a simulator's step may take no more than 100 us.
        """
        step = self.envs[row].step
        kept = [(key, rows[row, self._spaces.obs_horizon :]) for key, rows in self._spaces.named(tape)]
        success: bool | None = None
        at, terminated, truncated = -1, False, False
        try:
            for at, action in enumerate(actions):
                observation, rewards[at], terminated, truncated, info = step(action)
                for key, rows in kept:
                    rows[at] = observation if key is None else observation[key]
                if "success" in info:
                    success = bool(success or info["success"])
                if terminated or truncated:
                    break
        except Exception as error:
            raise env_error(self._first_number + row, "raised", error) from error
        return at + 1, bool(terminated), bool(truncated), success

    def _begin(self, row: int, histories: Histories, seed: int | None) -> None:
        """Start an episode, and fill the environment's row of ``histories`` with its first observation."""
        try:
            observation, _ = self.envs[row].reset(seed=seed)
        except Exception as error:
            raise env_error(self._first_number + row, "raised", error) from error
        first = self._spaces.read(observation)
        for key, value in first.items():
            check_finite(value[None], f"an observation '{key}'", self._first_number + row)
            histories[key][row] = value


class EpisodeTally:
    """Return, length and success of the episodes that run, and of those that ended and were not fetched."""

    def __init__(self, num_envs: int) -> None:
        self._num_envs = num_envs
        self._ended: list[EpisodeRecord] = []
        self.restart()

    def restart(self) -> None:
        """Forget the episodes that run; those that ended stay."""
        self._returns = [0.0] * self._num_envs
        self._lengths = [0] * self._num_envs
        self._success: list[bool | None] = [None] * self._num_envs

    def add(self, rewards: Sequence[float], steps: Sequence[int], success: Sequence[bool | None]) -> None:
        """Every environment went so many steps further, for so much reward; None: success is not known."""
        for row, succeeded in enumerate(success):
            self._returns[row] += rewards[row]
            self._lengths[row] += steps[row]
            if succeeded is not None:
                self._success[row] = succeeded or bool(self._success[row])

    def end(self, row: int) -> None:
        """The episode of environment ``row`` is over."""
        self._ended.append(EpisodeRecord(self._returns[row], self._lengths[row], self._success[row]))
        self._returns[row], self._lengths[row], self._success[row] = 0.0, 0, None

    def pop(self) -> list[EpisodeRecord]:
        """The episodes that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended


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


def env_error(number: int, doing: str, error: Exception) -> FlowPolicyError:
    """What environment ``number`` raised, as one sentence that names it; to be raised from ``error``."""
    return FlowPolicyError(
        f"Environment {number} {doing} {described(error)}; mend the environment, "
        "then call reset() or start again."
    )


def described(error: Exception) -> str:
    """Kind and message of an error, to be put into a sentence."""
    message = str(error).rstrip(". \n")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
