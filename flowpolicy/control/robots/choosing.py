"""The robot of a control run: one of this package, or a class of the user's."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flowpolicy.control.robot import Robot
from flowpolicy.control.robots.simulated import SimulatedRobot
from flowpolicy.control.robots.trace import TraceRobot
from flowpolicy.data.store import read_demonstrations
from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.task import Task, task_of
from flowpolicy.features import TextFeature
from flowpolicy.policy import FlowPolicy
from flowpolicy.settings import choose, require

ROBOT_SEED = 7_000_000
"""First environment seed of control runs; evaluation, calibration and training use lower ones."""


@dataclass(frozen=True)
class RobotConfig:
    """The choice of a robot.

    Attributes:
        kind: ``simulated``, the task's environment in real time; ``trace``, recorded observations; or
            ``module:Class``, a robot of your own (:class:`~flowpolicy.control.robot.Robot`) from an installed
            module or a file of the present folder.
        options: arguments of your own class.
        seed: environment seed of the first simulated episode.
        rate_hz: rate of a simulation or trace; None takes the task's own.
        path: store of the trace; None takes the task's own demonstrations.
    """

    kind: str = "simulated"
    options: dict[str, Any] | None = None
    seed: int = ROBOT_SEED
    rate_hz: float | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if ":" not in self.kind:
            choose(_ROBOTS, self.kind, "robot.kind")
            allowed = "left out but with robot.kind=module:Class"
            require(not self.options, "robot.options", self.options, allowed)
            return
        for name in ("rate_hz", "path"):
            value = getattr(self, name)
            require(value is None, f"robot.{name}", value, f"an entry of robot.options for {self.kind}")


def build_robot(
    config: RobotConfig, policy: FlowPolicy, env: Mapping[str, Any] | None, checkpoint: str
) -> Robot:
    """The robot of a config.

    Args:
        config: says which.
        policy: gives a trace its observation keys, and a task where ``env`` is None.
        env: settings of the task that a simulation or trace is of.
        checkpoint: of the policy, for messages.

    Raises:
        FlowPolicyError: it cannot be built, or is no robot.
    """
    if ":" in config.kind:
        return _own(config.kind, config.options or {})
    return _ROBOTS[config.kind](config, policy, task_of(policy.spec.task, env, checkpoint), env or {})


def _own(kind: str, options: Mapping[str, Any]) -> Robot:
    module, _, name = kind.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), name)
        inspect.signature(made).bind(**options)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"robot.kind={kind} cannot be imported ({error}); name a class as module:Class, of an installed "
            "module or a file of the present folder."
        ) from error
    except TypeError as error:
        raise ConfigError(f"robot.options do not fit {name}{inspect.signature(made)}: {error}.") from error
    robot = made(**options)
    lacking = [part for part in ("spec", "observe", "act", "close") if not hasattr(robot, part)]
    if lacking:
        raise ConfigError(f"robot.kind={kind} lacks {', '.join(lacking)}; a robot has all four.")
    return cast(Robot, robot)


def _simulated(config: RobotConfig, policy: FlowPolicy, task: Task, env: Mapping[str, Any]) -> Robot:
    return SimulatedRobot(task, seed=config.seed, rate_hz=config.rate_hz)


def _trace(config: RobotConfig, policy: FlowPolicy, task: Task, env: Mapping[str, Any]) -> Robot:
    path = config.path or env.get("demonstrations")
    if not path:
        raise ConfigError("A trace needs robot.path=STORE, or env= of a task that names its demonstrations.")
    demos = read_demonstrations(path, policy.spec.observation_shapes)
    observations = {
        key: demos.values(key, feature) if isinstance(feature, TextFeature) else demos.arrays[key]
        for key, feature in policy.spec.features.items()
    }
    return TraceRobot(
        observations, demos.episode_ends, demos.arrays["action"], config.rate_hz or task.control_hz,
        task.safe_action or "hold",
    )  # fmt: skip


_ROBOTS: dict[str, Callable[[RobotConfig, FlowPolicy, Task, Mapping[str, Any]], Robot]] = {
    "simulated": _simulated,
    "trace": _trace,
}
