"""The robot of a control run: one of this package, or a class or function of the user's."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.robot import Robot
from flowpolicy.control.robots.gymnasium import gymnasium_task
from flowpolicy.control.robots.lerobot import LeRobotRobot
from flowpolicy.control.robots.lerobot_config import lerobot_robot
from flowpolicy.control.robots.renaming import RenamedRobot
from flowpolicy.control.robots.simulated import SimulatedRobot
from flowpolicy.control.robots.trace import TraceRobot
from flowpolicy.data.store import read_demonstrations
from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.task import Task, task_of
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.features import TextFeature
from flowpolicy.policy import FlowPolicy
from flowpolicy.settings import build, choose, require

ROBOT_SEED = 7_000_000
"""First environment seed of control runs; evaluation, calibration and training use lower ones."""
MOST_CLIP = 1.5
"""Of a policy's actions, in demonstrated ranges, up to which they are taken for a robot's limits."""


@dataclass(frozen=True)
class RobotConfig:
    """The choice of a robot.

    Attributes:
        kind: ``simulated``, the task's environment in real time; ``trace``, recorded observations;
            ``gymnasium``, any environment; ``lerobot``, a robot of lerobot; or ``module:name``, a class or
            function of your own that gives a robot (:class:`~flowpolicy.control.robot.Robot`), from an
            installed module or a file of the present folder.
        options: arguments of your own.
        seed: environment seed of the first simulated episode.
        rate_hz: rate of a simulation or trace; None takes the task's own.
        path: store of the trace; None takes the task's own demonstrations.
        observations: the policy's key -> the robot's, where their names differ.
    """

    kind: str = "simulated"
    options: dict[str, Any] | None = None
    seed: int = ROBOT_SEED
    rate_hz: float | None = None
    path: str | None = None
    observations: dict[str, str] | None = None

    @classmethod
    def from_settings(cls, values: Mapping[str, Any], where: str) -> RobotConfig:
        """The config of the kind that ``values`` name.

        Raises:
            ConfigError: a setting that the kind does not have.
        """
        kind = str(values.get("kind", cls.kind))
        return build(_CONFIGS.get(kind, RobotConfig), values, where)

    def __post_init__(self) -> None:
        if ":" not in self.kind:
            choose(_ROBOTS, self.kind, "robot.kind")
            takes_options = type(self) is not RobotConfig
            allowed = "left out but with robot.kind=module:Class"
            require(takes_options or not self.options, "robot.options", self.options, allowed)
            return
        for name in ("rate_hz", "path"):
            value = getattr(self, name)
            require(value is None, f"robot.{name}", value, f"an entry of robot.options for {self.kind}")


@dataclass(frozen=True)
class GymnasiumConfig(RobotConfig):
    """Any Gymnasium environment as the robot, whatever the policy was trained on.

    Attributes:
        env_id: Gymnasium id; ``module:id`` imports the module that registers it.
        env_kwargs: keyword arguments of ``gymnasium.make``.
        rate_hz: its steps per second of real time; None takes the task's own, or the environment's.
        safe_action: ``hold``, ``zero`` or numbers; None takes the task's own.
    """

    kind: str = "gymnasium"
    env_id: str = ""
    env_kwargs: dict[str, Any] | None = None
    safe_action: str | tuple[float, ...] | None = None


@dataclass(frozen=True)
class LeRobotConfig(RobotConfig):
    """A robot of lerobot, from lerobot's own config classes.

    Attributes:
        type: lerobot's name of the robot, such as ``so101_follower``.
        port: of its bus.
        id: names its calibration file.
        calibration_dir: of that file, where it is not lerobot's own folder.
        cameras: name -> settings of lerobot's camera; ``type`` is ``opencv`` where it is left out.
        options: further settings of lerobot's config class, such as ``max_relative_target``.
        rate_hz: polls a second; None takes the rate that the policy was trained at.
        action_low: least command; None takes the least demonstrated one.
        action_high: greatest command; likewise.
        safe_action: ``hold`` repeats the last valid command.
    """

    kind: str = "lerobot"
    type: str = ""
    port: str | None = None
    id: str | None = None
    calibration_dir: str | None = None
    cameras: dict[str, Any] | None = None
    action_low: float | tuple[float, ...] | None = None
    action_high: float | tuple[float, ...] | None = None
    safe_action: str | tuple[float, ...] = "hold"


def build_robot(
    config: RobotConfig, policy: ChunkPolicy | None, env: Mapping[str, Any] | None, checkpoint: str
) -> Robot:
    """The robot of a config, with the observations of the policy by the policy's names.

    Args:
        config: says which.
        policy: gives its observation keys, and a task where ``env`` is None; None where it is known only once
            the robot is.
        env: settings of the task that a simulation or trace is of.
        checkpoint: of the policy, for messages.

    Raises:
        FlowPolicyError: it cannot be built, or is no robot.
    """
    if ":" in config.kind:
        robot = _own(config.kind, config.options or {})
    else:
        robot = _ROBOTS[config.kind](config, policy, env, checkpoint)
    if policy is None:
        return robot
    try:
        renamed = RenamedRobot(robot, policy.spec.features, config.observations)
    except Exception:
        robot.close()
        raise
    return renamed if renamed.changes else robot


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


def _task(policy: ChunkPolicy | None, env: Mapping[str, Any] | None, checkpoint: str) -> Task:
    return task_of({} if policy is None else policy.spec.task, env, checkpoint)


def _simulated(
    config: RobotConfig, policy: ChunkPolicy | None, env: Mapping[str, Any] | None, checkpoint: str
) -> Robot:
    return SimulatedRobot(_task(policy, env, checkpoint), seed=config.seed, rate_hz=config.rate_hz)


def _gymnasium(
    config: RobotConfig, policy: ChunkPolicy | None, env: Mapping[str, Any] | None, checkpoint: str
) -> Robot:
    assert isinstance(config, GymnasiumConfig)
    known = env if env is not None else policy.spec.task if policy is not None else {}
    task = gymnasium_task(config.env_id, config.env_kwargs or {}, config.rate_hz, config.safe_action, known)
    return SimulatedRobot(task, seed=config.seed)


def _trace(
    config: RobotConfig, policy: ChunkPolicy | None, env: Mapping[str, Any] | None, checkpoint: str
) -> Robot:
    task = _task(policy, env, checkpoint)
    path = config.path or (env or {}).get("demonstrations")
    if not path:
        raise ConfigError("A trace needs robot.path=STORE, or env= of a task that names its demonstrations.")
    features = {} if policy is None else policy.spec.features
    demos = read_demonstrations(path, features)
    observations = {
        key: demos.values(key, feature) if isinstance(feature, TextFeature) else demos.arrays[key]
        for key, feature in features.items()
    }
    return TraceRobot(
        observations, demos.episode_ends, demos.arrays["action"], config.rate_hz or task.control_hz,
        task.safe_action or "hold",
    )  # fmt: skip


def _lerobot(
    config: RobotConfig, policy: ChunkPolicy | None, env: Mapping[str, Any] | None, checkpoint: str
) -> Robot:
    assert isinstance(config, LeRobotConfig)
    known = env if env is not None else policy.spec.task if policy is not None else {}
    rate = config.rate_hz or known.get("control_hz")
    if not rate:
        raise ConfigError(
            f"robot.rate_hz is missing, and {checkpoint or 'the policy'} does not say at which rate it was "
            "trained; give the frames per second of the recording."
        )
    settings = {
        "port": config.port, "id": config.id, "calibration_dir": config.calibration_dir,
        "cameras": config.cameras,
    }  # fmt: skip
    given = {key: value for key, value in settings.items() if value is not None}
    robot = lerobot_robot(config.type, {**given, **(config.options or {})})
    low, high = _bounds(config, policy, len(robot.action_features))
    return LeRobotRobot(
        robot, rate_hz=float(rate), action_low=low, action_high=high, safe_action=config.safe_action
    )


def _bounds(
    config: LeRobotConfig, policy: ChunkPolicy | None, dim: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Least and greatest command: those given, else those of the policy's task, else the least and greatest
    that the policy can give."""
    declared = (policy.spec.task if policy is not None else {}).get("action_bounds")
    declared = declared if declared is not None and len(declared[0]) == dim else (None, None)
    low, high = (
        _each(given if given is not None else told, dim)
        for given, told in zip((config.action_low, config.action_high), declared, strict=True)
    )
    if low is not None and high is not None:
        return low, high
    # What a network learns of relative commands, or of rotations, bounds no command.
    normalizer = None
    if isinstance(policy, FlowPolicy) and policy.action_space.is_plain:
        normalizer = policy.action_normalizer
    if normalizer is None or normalizer.mode == "none" or normalizer.clip > MOST_CLIP:
        raise ConfigError(
            "robot.action_low and robot.action_high are missing, and the policy does not bound its actions; "
            "give the least and the greatest command, in the robot's units."
        )
    center, reach = normalizer.center.cpu().numpy(), normalizer.clip * normalizer.scale.cpu().numpy()
    return center - reach if low is None else low, center + reach if high is None else high


def _each(bound: float | Sequence[float] | None, dim: int) -> NDArray[np.float32] | None:
    """One bound for each dimension."""
    if bound is None:
        return None
    return (
        np.full(dim, bound, np.float32) if isinstance(bound, float | int) else np.asarray(bound, np.float32)
    )


_ROBOTS: dict[str, Callable[..., Robot]] = {
    "simulated": _simulated,
    "trace": _trace,
    "gymnasium": _gymnasium,
    "lerobot": _lerobot,
}
_CONFIGS: dict[str, type[RobotConfig]] = {"gymnasium": GymnasiumConfig, "lerobot": LeRobotConfig}
