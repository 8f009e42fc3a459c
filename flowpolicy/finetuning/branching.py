"""Groups of environments that play their chunks from one simulator state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.episodes import EpisodeRecord
from flowpolicy.execution.history import Histories
from flowpolicy.finetuning.environments import ChunkEnv, ChunkStep
from flowpolicy.settings import require


@runtime_checkable
class Restorable(ChunkEnv, Protocol):
    """Environments that can be put to a state of another."""

    def why_not_restorable(self) -> str:
        """Why the rest of this can only fail, as the rest of a sentence; empty where it can be done."""

    def states(self) -> Any:
        """Where all environments stand; its ``rows(index)`` are some of them."""

    def reset_to(self, states: Any, rows: Sequence[int] | None = None) -> Histories:
        """Go on from ``states``, one for each of the environments ``rows``; the histories of all."""


class BranchingChunks:
    """Each group of G neighbouring environments starts from one state, again and again; a :class:`ChunkEnv`.

    The first of a group goes on from chunk to chunk, so that the states are those that the policy comes to.
    The other G - 1 are side branches: after ``length`` chunks they are put where the first one stands. There
    their rows say truncated, unless they came to a terminal state, and ``final_observation`` is where they
    had come to. What ends in a side branch is no episode: its rows say restarted.

    Args:
        chunks: the environments, N.
        group_size: G.
        length: chunks of a branch.

    Raises:
        ConfigError: they cannot be put to a state, or N is no multiple of G.
    """

    def __init__(self, chunks: ChunkEnv, group_size: int, length: int) -> None:
        stepped = type(getattr(chunks, "venv", chunks)).__name__
        why_not = f"a {stepped} keeps it out of reach; take ChunkedVecEnv.in_processes"
        if isinstance(chunks, Restorable):
            why_not = chunks.why_not_restorable()
        if why_not:
            raise ConfigError(
                "Groups of chunks start from one state of the simulator: the task needs native chunks "
                f"(env.native), or an environment with clone_state() and restore_state(), and {why_not}."
            )
        assert isinstance(chunks, Restorable)
        allowed = f"a multiple of the {group_size} of a group, in each process that learns"
        require(chunks.num_envs % group_size == 0, "num_envs", chunks.num_envs, allowed)
        self.chunks, self.length, self.num_envs = chunks, length, chunks.num_envs
        self.observation_space, self.action_space = chunks.observation_space, chunks.action_space
        numbers = np.arange(self.num_envs)
        self._is_side = numbers % group_size > 0
        self._sides = numbers[self._is_side]
        self._origins = (numbers - numbers % group_size)[self._is_side]
        self._played = 0
        self._episodes: list[EpisodeRecord] = []

    def reset(self, seed: int | None = None) -> Histories:
        """See :meth:`ChunkEnv.reset`."""
        self.chunks.reset(seed)
        return self.branch()

    def step(self, chunks: NDArray[Any]) -> ChunkStep:
        """See :meth:`ChunkEnv.step`."""
        step = self.chunks.step(chunks)
        ended = step.terminated | step.truncated
        whole = np.flatnonzero(ended & ~step.restarted)  # of a process that died nothing is known
        episodes = zip(whole.tolist(), self.chunks.pop_episodes(), strict=True)
        self._episodes += [episode for row, episode in episodes if not self._is_side[row]]
        self._played += 1
        if self._played < self.length:
            return dataclasses.replace(step, restarted=step.restarted | (self._is_side & ended))
        return dataclasses.replace(
            step,
            observation=self.branch(),
            truncated=step.truncated | (self._is_side & ~step.terminated),
            restarted=step.restarted | self._is_side,
        )

    def branch(self) -> Histories:
        """Put all side branches where the first of their group stands; the histories of all."""
        self._played = 0
        return self.chunks.reset_to(self.chunks.states().rows(self._origins), self._sides.tolist())

    def pop_episodes(self) -> list[EpisodeRecord]:
        """See :meth:`ChunkEnv.pop_episodes`."""
        episodes, self._episodes = self._episodes, []
        return episodes

    def close(self) -> None:
        """See :meth:`ChunkEnv.close`."""
        self.chunks.close()
