"""Advantages of chunks: a chunk of n environment steps is one decision, discounted by gamma^n."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAST_SCALE = 0.1
"""Share of the largest return so far that rewards are at least divided by."""
LEAST_ADVANTAGE = 0.005
"""Of the return scale: the least by which advantages are divided; what is smaller is the critic's error."""
LARGEST_ADVANTAGE = 5.0
"""Up to which a normalised advantage counts as evidence: a few chunks move the policy less than many."""


@dataclass(frozen=True)
class Experience:
    """An iteration's S chunks in each of N environments, as advantages are made from them; all ``(S, N)``.

    Attributes:
        rewards: discounted reward of each chunk in scaled units; see :func:`chunk_rewards`.
        executed: environment steps of each chunk.
        terminated: the chunk ended in a terminal state, whose value is 0.
        ended: the episode ended, in a terminal state or by a time limit.
        values: the critic's value of the observation before the chunk.
        next_values: of the observation after it; where an episode ended, of its true last observation.
    """

    rewards: Array
    executed: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    ended: NDArray[np.bool_]
    values: Array
    next_values: Array


class AdvantageStrategy(Protocol):
    """How good each chunk was, compared with others.

    To one that has a ``group_size`` G each G neighbours in N are branches from one state, which begin at
    every ``branch_length``-th of the S chunks; see
    :class:`~flowpolicy.finetuning.branching.BranchingChunks`.
    """

    @property
    def gamma(self) -> float:
        """Discount per environment step."""

    def __call__(self, experience: Experience) -> tuple[Array, Array]:
        """Advantages, not yet normalised, and the returns that the critic learns; both ``(S, N)``."""


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimates over chunks (Schulman et al. 2016, eq. 16), lambda per chunk.

    Attributes:
        gamma: discount per environment step: a chunk of n steps discounts gamma^n.
        gae_lambda: weight of longer estimates, per chunk.
    """

    gamma: float = 0.995
    gae_lambda: float = 0.95

    def __call__(self, experience: Experience) -> tuple[Array, Array]:
        """See :class:`AdvantageStrategy`."""
        e, discount = experience, self.gamma**experience.executed
        errors = e.rewards + np.where(e.terminated, 0.0, discount * e.next_values) - e.values
        carry = np.where(e.ended, 0.0, discount * self.gae_lambda)
        advantages = np.zeros(errors.shape)
        ahead = np.zeros(errors.shape[1])
        for step in reversed(range(len(errors))):
            ahead = errors[step] + carry[step] * ahead
            advantages[step] = ahead
        return advantages, advantages + e.values


def chunk_rewards(rewards: NDArray[np.floating[Any]], gamma: float) -> Array:
    """Discounted reward inside each chunk, sum_i gamma^i r_i.

    Args:
        rewards: ``(..., T_e)`` per environment step, 0 after the last executed one.
        gamma: discount per environment step.
    """
    weights = gamma ** np.arange(rewards.shape[-1], dtype=np.float64)
    return np.asarray((rewards * weights).sum(-1), dtype=np.float64)


class RunningMoments:
    """Mean and standard deviation of values that come in parts."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, squares: float = 0.0) -> None:
        self.count, self.mean, self.squares = count, mean, squares

    def merge(self, count: float, mean: float, squares: float) -> None:
        """Combine with the moments of further values (Chan et al. 1979)."""
        total = self.count + count
        if total == 0:
            return
        delta = mean - self.mean
        self.squares += squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """The standard deviation, 0 of nothing."""
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0


class ReturnScale(RunningMoments):
    """Standard deviation of the running discounted return, by which rewards are divided.

    The return of each environment runs on across calls and restarts with each episode. Where returns are
    rare, their standard deviation tends to 0 while one of them is as large as ever; so the scale is at least
    ``LEAST_SCALE`` of the largest return, and no scaled return is beyond ``1 / LEAST_SCALE``.

    Attributes:
        largest: magnitude of the largest return so far.
    """

    def __init__(self, num_envs: int, gamma: float) -> None:
        super().__init__()
        self.gamma, self.largest = gamma, 0.0
        self.running = np.zeros(num_envs)

    def run(
        self, rewards: NDArray[np.floating[Any]], executed: NDArray[np.int64], ended: NDArray[np.bool_]
    ) -> tuple[float, float, float, float]:
        """What :meth:`merge` takes, of ``(S, N, T_e)`` rewards of ``(S, N)`` chunks."""
        seen = []
        for step in range(len(rewards)):
            for i in range(rewards.shape[-1]):
                live = i < executed[step]
                self.running = np.where(live, self.gamma * self.running + rewards[step, :, i], self.running)
                seen.append(self.running[live])
            self.running = np.where(ended[step], 0.0, self.running)
        returns = np.concatenate([np.zeros(0), *seen])
        return *moments_of(returns), float(np.abs(returns).max(initial=0.0))

    def merge(self, count: float, mean: float, squares: float, largest: float = 0.0) -> None:
        """Combine with the moments and the largest magnitude of further returns."""
        super().merge(count, mean, squares)
        self.largest = max(self.largest, largest)

    def state(self) -> tuple[float, float, float, float]:
        """What an empty scale merges to become this one; episodes that run are not in it."""
        return self.count, self.mean, self.squares, self.largest

    @property
    def value(self) -> float:
        """The scale; 1 where every return was 0."""
        return max(self.std, LEAST_SCALE * self.largest) or 1.0


def returns_differ(lowest: float, highest: float, *, is_terminated: bool) -> bool:
    """Whether any action can have been better than another, by the rewards of an iteration.

    Where all rewards are one number, returns differ by the length of episodes alone, and that only where the
    number is not 0 and an episode came to a terminal state: a time limit is bootstrapped.
    """
    return highest > lowest or (is_terminated and highest != 0.0)


def moments_of(values: Array) -> tuple[float, float, float]:
    """Count, mean, and sum of squared deviations."""
    if not values.size:
        return 0.0, 0.0, 0.0
    mean = float(values.mean())
    return float(values.size), mean, float(((values - mean) ** 2).sum())
