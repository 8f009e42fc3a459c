"""Moments of episodes that other environments of the task can go on from, environment by environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gymnasium import wrappers

from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.environment import StandardEnvironment
from flowpolicy.execution.history import Histories
from flowpolicy.finetuning.staggered import CutFirstEpisode

PASSIVE: tuple[type, ...] = (StandardEnvironment, wrappers.PassiveEnvChecker)
"""Wrappers whose steps depend on nothing but the environment in them."""
COUNTING: dict[type, str] = {
    CutFirstEpisode: "left", wrappers.TimeLimit: "_elapsed_steps", wrappers.OrderEnforcing: "_has_reset",
}  # fmt: skip
"""Wrappers whose steps depend on one attribute besides."""


class Cloneable(Protocol):
    """What an environment, or a wrapper for all that is in it, offers besides Gymnasium's interface so that
    others of the task can go on from where it stands; the names are the Arcade Learning Environment's.
    """

    def clone_state(self) -> Any:
        """All that its next steps depend on, as a copy that they do not change.

        Random numbers that steps draw are a part of it, those of later resets are not. It is sent between
        processes, so it can be pickled.
        """

    def restore_state(self, state: Any) -> None:
        """Stand where the environment of :meth:`clone_state` stood; a state may be used again."""


@dataclass(frozen=True)
class ClonedStates:
    """Moments of episodes that can be gone on from, in the same environments or in others of the task.

    Attributes:
        envs: M of them, see :func:`clone`.
        histories: key -> ``(M, T_o, *shape)``.
    """

    envs: list[Any]
    histories: Histories

    def __len__(self) -> int:
        return len(self.envs)

    def rows(self, index: Any) -> ClonedStates:
        """Some of them; ``np.repeat(rows, G)`` gives each of ``rows`` G times, for groups of chunks."""
        numbers = np.arange(len(self))[index].tolist()
        histories = {key: rows[index] for key, rows in self.histories.items()}
        return ClonedStates([self.envs[number] for number in numbers], histories)

    @classmethod
    def joined(cls, parts: Sequence[ClonedStates]) -> ClonedStates:
        """One after the other."""
        histories = {
            key: np.concatenate([part.histories[key] for part in parts]) for key in parts[0].histories
        }
        return cls([env for part in parts for env in part.envs], histories)


def _is_cloneable(env: Any) -> bool:
    """Whether its class has both methods: a wrapper that hands on unknown names would seem to have them."""
    return all(hasattr(type(env), name) for name in ("clone_state", "restore_state"))


def why_not_cloneable(env: Any) -> str:
    """Why ``env`` cannot be cloned, as the rest of a sentence; empty where it can be."""
    while not _is_cloneable(env):
        if env is env.unwrapped:
            return f"{type(env).__name__} does not have both"
        if type(env) not in (*PASSIVE, *COUNTING):
            return f"there is a {type(env).__name__} around it that does not have them"
        env = env.env
    return ""


def clone(env: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Where ``env`` stands: what its wrappers count, from the outermost in, and its own state."""
    counting, own = _parts(env)
    return [(name, getattr(wrapper, name)) for name, wrapper in counting], own.clone_state()


def restore(env: Any, state: tuple[list[tuple[str, Any]], Any]) -> None:
    """Put ``env`` where another one stood.

    Raises:
        FlowPolicyError: there are other wrappers around it.
    """
    counts, theirs = state
    counting, own = _parts(env)
    here, there = [name for name, _ in counting], [name for name, _ in counts]
    if here != there:
        raise FlowPolicyError(
            "Environments that go on from each other's states need the same wrappers, and those of one count "
            f"{', '.join(there) or 'nothing'}, those of another {', '.join(here) or 'nothing'}."
        )
    own.restore_state(theirs)
    for (name, wrapper), (_, count) in zip(counting, counts, strict=True):
        setattr(wrapper, name, count)


def _parts(env: Any) -> tuple[list[tuple[str, Any]], Cloneable]:
    """The wrappers that count, each with its attribute, from the outermost in; and what can be cloned."""
    counting = []
    while not _is_cloneable(env):
        if type(env) in COUNTING:
            counting.append((COUNTING[type(env)], env))
        env = env.env
    return counting, env
