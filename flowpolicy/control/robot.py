"""The robot interface of the control loop: observe, act, and a description with the rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from flowpolicy.errors import ConfigError
from flowpolicy.execution.fusion import Action as Action
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.execution.rotations import Rotation
from flowpolicy.features import Feature
from flowpolicy.ranges import PositiveFinite
from flowpolicy.settings import Settings, require

Observation = Mapping[str, Any]

TIMESTAMP = "timestamp"
"""Key of an observation: seconds of ``time.monotonic()`` at which it was measured; without it, now."""
EPISODE = "episode"
"""Key of an observation: a number that changes when the world was reset; without it, never."""
SUCCESS = "success"
"""Key of an episode's first observation: whether the episode before it succeeded, 1 or 0; without it, or with
any other number, nobody knows."""
TERMINATED = "terminated"
"""Key of an episode's first observation: whether the episode before it ended in a terminal state, 1 or 0;
without it, it did not."""
TOTAL_REWARD = "total_reward"
"""Key of an observation: sum of all rewards so far, over all episodes, of robots whose world gives rewards;
so none is lost where an observation is missed, nor the last one of an episode."""
PRESENT_POSE = "present_pose"
"""Key of an observation: the command ``(A,)`` that would keep the robot where it is, of robots that are
commanded to positions; without it, unknown."""


class RobotError(RuntimeError):
    """A robot that could not be observed or commanded; the loop counts it and goes on.

    Args:
        message: what went wrong.
        count: how often since the last time, where a driver tries by itself.
        unsent: the command certainly did not reach the robot, which keeps the one before it.
    """

    def __init__(self, message: str = "", count: int = 1, *, unsent: bool = False) -> None:
        super().__init__(message)
        self.count, self.unsent = count, unsent


@dataclass(frozen=True)
class RobotSpec(Settings, prefix="robot"):
    """What a robot takes and gives.

    Attributes:
        name: for messages and reports.
        observation_shapes: key -> shape of one observation, or its feature where the robot knows the kind.
        action_low: ``(A,)`` least command, physical units.
        action_high: ``(A,)`` greatest command.
        rate_hz: its native control rate.
        safe_action: what it is sent where nothing valid can be: ``hold`` repeats the last valid command
            (position control), ``zero`` is no torque or no velocity; or a command ``(A,)``.
        origin: time of ``time.monotonic()`` of one of its own control steps, where it has a clock of its
            own; the loop then ticks half a period after them. None: the loop sets the clock.
        device: name of its hardware on this machine, such as ``/dev/ttyUSB0``; two programs never share
            it. Empty: only the same object is refused.
        heartbeat_s: without a command after which it takes its safe action by itself; None where it does not.
        rotations: which dimensions of a command are absolute rotations, for ensembling.
        action_names: of the dimensions of a command, for reports; empty: their numbers.
        is_hardware: whether its commands move something; a simulation's and a recording's do not.
    """

    name: str
    observation_shapes: Mapping[str, Feature | tuple[int, ...]]
    action_low: Action
    action_high: Action
    rate_hz: PositiveFinite
    safe_action: str | tuple[float, ...]
    origin: float | None = None
    device: str = ""
    heartbeat_s: float | None = None
    rotations: tuple[Rotation, ...] = ()
    action_names: tuple[str, ...] = ()
    is_hardware: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = (np.asarray(bound, dtype=np.float32) for bound in (self.action_low, self.action_high))
        object.__setattr__(self, "action_low", low)
        object.__setattr__(self, "action_high", high)
        bounds = f"{self.name}: action_low {low.tolist()} and action_high {high.tolist()} must be"
        if low.shape != high.shape or low.ndim != 1 or not (low <= high).all():
            raise ConfigError(f"{bounds} vectors of one length, each lower bound at most its upper bound.")
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ConfigError(f"{bounds} finite; name the least and the greatest command of this robot.")
        for rotation in self.rotations:
            ok = rotation.dims.stop <= len(low)
            require(ok, "rotations", rotation, f"within the {len(low)} dimensions of a command")
        if not self.action_names:
            object.__setattr__(self, "action_names", tuple(f"action_{i}" for i in range(len(low))))
        ok = len(self.action_names) == len(low)
        require(ok, "action_names", self.action_names, f"{len(low)} names")
        if isinstance(self.safe_action, str):
            ok = self.safe_action in ("hold", "zero")
            require(ok, "safe_action", self.safe_action, "hold, zero or numbers")
        else:
            given = np.asarray(self.safe_action, dtype=np.float32)
            ok = given.shape == low.shape and bool(((low <= given) & (given <= high)).all())
            require(ok, "safe_action", self.safe_action, f"{len(low)} numbers within the action bounds")

    @property
    def action_dim(self) -> int:
        """A."""
        return len(self.action_low)

    def check(self, policy: ChunkPolicy) -> None:
        """Refuse a policy that does not fit.

        Raises:
            TaskError: names what differs.
        """
        policy.spec.check(self.name, self.observation_shapes, (self.action_dim,))


class Robot(Protocol):
    """Anything that can be observed and commanded. Neither call may wait for the world.

    A robot whose world resets itself may have a method ``end_episode()`` too: the operator has ended the
    episode. It returns at once, and observations carry another ``episode`` when the world has been reset.
    """

    @property
    def spec(self) -> RobotSpec:
        """What it takes and gives."""

    def observe(self) -> Observation:
        """The newest observation: key -> array of the spec's shape; ``timestamp``, ``episode`` and
        ``present_pose`` if known."""

    def act(self, action: Action) -> None:
        """Take a command ``(A,)`` within the bounds; it holds until the next one."""

    def close(self) -> None:
        """Let go of it; a second call does nothing."""


def innermost(robot: Robot) -> Robot:
    """The robot inside of those that only pass on what another does."""
    while (inner := getattr(robot, "robot", None)) is not None and hasattr(inner, "spec"):
        robot = inner
    return robot
