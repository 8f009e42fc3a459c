"""Any Gymnasium environment as a task for :class:`~flowpolicy.control.robots.simulated.SimulatedRobot`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.task import Task, make_environment


def gymnasium_task(
    env_id: str,
    env_kwargs: Mapping[str, Any],
    rate_hz: float | None,
    safe_action: str | tuple[float, ...] | None,
    trained_for: Mapping[str, Any],
) -> Task:
    """The task of an environment that the policy need not have been trained in.

    Args:
        env_id: Gymnasium id.
        env_kwargs: keyword arguments of ``gymnasium.make``.
        rate_hz: steps per second; None: those of ``trained_for``, or the environment's ``render_fps``.
        safe_action: None: that of ``trained_for``.
        trained_for: settings of the policy's task.

    Raises:
        ConfigError: rate or safe action is nowhere said.
        TaskError: there is no such environment.
    """
    if not env_id:
        raise ConfigError("robot.env_id is missing; name an environment, e.g. robot.env_id=Hopper-v5.")
    rate = rate_hz or trained_for.get("control_hz") or _own_rate(env_id, env_kwargs)
    if not rate:
        raise ConfigError(f"{env_id} does not say its rate; give robot.rate_hz, its steps per second.")
    safe = safe_action if safe_action is not None else trained_for.get("safe_action")
    if not safe:
        raise ConfigError(
            f"robot.safe_action is missing for {env_id}; give hold (position control), zero (torque, "
            "velocity) or numbers."
        )
    name = re.sub(r"[^\w.+\- ]", "-", env_id.rpartition("/")[2])[:100]
    safe = safe if isinstance(safe, str) else tuple(safe)
    return Task(name, env_id, dict(env_kwargs), control_hz=float(rate), safe_action=safe)


def _own_rate(env_id: str, env_kwargs: Mapping[str, Any]) -> float | None:
    env = make_environment(env_id, env_kwargs, "robot.env_id")
    try:
        rate = env.metadata.get("render_fps")
        return float(rate) if rate else None
    finally:
        env.close()
