"""The request rule of delayed inference: when a chunk is asked for, and from which tick it can be used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.robot import Action
from flowpolicy.errors import ConfigError
from flowpolicy.execution.fusion import Chunk, Fusion, Switch, build_fusion
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.settings import require

STRATEGIES = ("synchronous", "switch", "ensemble", "rtc")

DrawDelay = Callable[[np.random.Generator], int]
Delay = int | Sequence[int] | NDArray[np.integer[Any]] | DrawDelay


@dataclass(frozen=True)
class DelayRule:
    """When chunks are asked for, when they come, and how they are put together.

    Attributes:
        policy: that plans them.
        strategy: one of :data:`STRATEGIES`.
        draw: gives the delay of a request.
        fixed: the delay, where it is always the same.
        execute_horizon: T_e.
    """

    policy: ChunkPolicy
    strategy: str
    draw: DrawDelay
    fixed: int | None
    execute_horizon: int

    @classmethod
    def of(cls, policy: ChunkPolicy, strategy: str, delay: Delay, execute_horizon: int) -> DelayRule:
        """Check the settings; see :func:`flowpolicy.evaluation.delayed.run_delayed`."""
        require(strategy in STRATEGIES, "strategy", strategy, f"one of {', '.join(STRATEGIES)}")
        options = {*inspect.signature(policy.act).parameters, *getattr(policy, "options", ())}
        if strategy == "rtc" and "prefix" not in options:
            raise ConfigError(
                "strategy=rtc needs a policy that takes a prefix; give it a sampler of the policy with "
                "guidance={'name': 'prefix'}."
            )
        draw, fixed = _drawn(delay)
        rule = cls(policy, strategy, draw, fixed, execute_horizon)
        horizon = policy.spec.action_horizon
        require(
            1 <= execute_horizon <= horizon, "execute_horizon", execute_horizon, f"between 1 and {horizon}"
        )
        if strategy != "synchronous" and fixed is not None:
            require(
                rule.ticks_between + fixed <= horizon, "delay", fixed,
                f"small enough that a chunk of {horizon} lasts max(execute_horizon, delay) + delay ticks, "
                "until the next one arrives",
            )  # fmt: skip
        return rule

    @property
    def ticks_between(self) -> int:
        """Ticks from one request to the next, the delay being fixed."""
        if self.strategy == "synchronous":
            return self.execute_horizon + (self.fixed or 0)
        return max(self.execute_horizon, self.fixed or 0)

    def fusion(self) -> Fusion:
        """For one episode."""
        if self.strategy == "synchronous":
            return Switch()
        return build_fusion(self.strategy, self.policy.spec.action_horizon, self.execute_horizon, 0)

    def chunk(self, actions: Action, tick: int, delay: int) -> tuple[Chunk, int]:
        """A chunk asked for at ``tick``, and the tick at which the next is due."""
        arrives = tick + delay
        if self.strategy == "synchronous":  # its actions begin when it arrives
            return Chunk(actions[: self.execute_horizon], arrives, arrives), arrives + self.execute_horizon
        return Chunk(actions, tick, arrives), tick + self.execute_horizon


def _drawn(delay: Delay) -> tuple[DrawDelay, int | None]:
    """How a delay is drawn, and the one there is where it is fixed."""
    if callable(delay):
        return delay, None
    choices = np.atleast_1d(np.asarray(delay))
    require(
        choices.dtype.kind in "iu" and choices.size > 0 and bool((choices >= 0).all()),
        "delay", delay, "whole environment steps, 0 or more",
    )  # fmt: skip
    fixed = int(choices[0]) if np.ndim(delay) == 0 else None
    return lambda generator: int(generator.choice(choices)), fixed
