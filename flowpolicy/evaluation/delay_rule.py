"""The settings of delayed inference: how late chunks come, how often they are asked for, how they join."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import ConfigError
from flowpolicy.execution.fusion import Action, Fusion, Switch, build_fusion
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.execution.rotations import Rotation
from flowpolicy.settings import require

STRATEGIES = ("synchronous", "switch", "ensemble", "rtc")

DrawDelay = Callable[[np.random.Generator], int]
Delay = int | Sequence[int] | NDArray[np.integer[Any]] | DrawDelay


@dataclass(frozen=True)
class DelayRule:
    """How often chunks are asked for, how late they come, and how they are put together.

    Attributes:
        policy: that samples them.
        strategy: one of :data:`STRATEGIES`.
        draw: gives the delay of a request.
        execute_horizon: T_e.
    """

    policy: ChunkPolicy
    strategy: str
    draw: DrawDelay
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
        horizon = policy.spec.action_horizon
        allowed = f"between 1 and {horizon}"
        require(1 <= execute_horizon <= horizon, "execute_horizon", execute_horizon, allowed)
        if strategy != "synchronous" and fixed is not None:
            allowed = f"so small that a chunk of {horizon} actions lasts max(execute_horizon, delay) + delay"
            require(max(execute_horizon, fixed) + fixed <= horizon, "delay", fixed, allowed)
        return cls(policy, strategy, draw, execute_horizon)

    def fusion(self) -> Fusion:
        """For one episode."""
        if self.strategy == "synchronous":
            return Switch()
        spec = self.policy.spec
        rotations = Rotation.of(spec.rotations)
        return build_fusion(self.strategy, spec.action_horizon, self.execute_horizon, 0, rotations=rotations)

    def executable(self, actions: Action) -> Action:
        """The actions ``(n, A)`` of a chunk that are executed unless another one comes."""
        return actions[: self.execute_horizon] if self.strategy == "synchronous" else actions


def _drawn(delay: Delay) -> tuple[DrawDelay, int | None]:
    """How a delay is drawn, and the one there is where it is fixed."""
    if callable(delay):
        return delay, None
    choices = np.atleast_1d(np.asarray(delay))
    are_steps = choices.dtype.kind in "iu" and choices.size > 0 and bool((choices >= 0).all())
    require(are_steps, "delay", delay, "whole environment steps, 0 or more")
    fixed = int(choices[0]) if np.ndim(delay) == 0 else None
    return lambda generator: int(generator.choice(choices)), fixed
