"""A robot that is observed and not commanded: what it would have been sent is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.robot import PRESENT_POSE, Action, Observation, Robot


class Rehearsal:
    """Passes on what a robot observes, and keeps the commands.

    Args:
        robot: is observed, and closed; never commanded.
        capacity: commands that are kept, the newest.

    Attributes:
        first: what the policy asked for first, before limits; None takes the first command.
    """

    def __init__(self, robot: Robot, capacity: int = 200_000) -> None:
        self.robot = robot
        self.spec = robot.spec
        self._commands = np.zeros((capacity, robot.spec.action_dim), np.float32)
        self._count = 0
        self._pose: NDArray[Any] | None = None  # at the first command
        self.first: Action | None = None

    def observe(self) -> Observation:
        """See :class:`~flowpolicy.control.robot.Robot`."""
        found = self.robot.observe()
        if not self._count and isinstance(found, Mapping):
            self._pose = found.get(PRESENT_POSE)
        return found

    def act(self, action: Action) -> None:
        """Keep a command ``(A,)``."""
        self._commands[self._count % len(self._commands)] = action
        self._count += 1

    def close(self) -> None:
        """See :class:`~flowpolicy.control.robot.Robot`."""
        self.robot.close()

    def findings(self, rate_hz: float) -> RehearsalFindings:
        """What would have been sent.

        Args:
            rate_hz: of the commands.
        """
        count, capacity = self._count, len(self._commands)
        kept = (
            self._commands[:count] if count <= capacity else np.roll(self._commands, -(count % capacity), 0)
        )
        pose = None if self._pose is None else np.asarray(self._pose, np.float32)
        return RehearsalFindings(kept.copy(), pose, self.robot.spec.action_names, rate_hz, self.first)


@dataclass(frozen=True)
class RehearsalFindings:
    """What a rehearsal would have sent.

    Attributes:
        commands: ``(steps, A)``, one a tick.
        pose: present pose ``(A,)`` before the first; None where the robot does not say it.
        names: of the dimensions.
        rate_hz: of the commands.
        first: what the policy asked for first, before limits ``(A,)``; None: the first of the commands.
    """

    commands: NDArray[np.float32]
    pose: NDArray[np.float32] | None
    names: tuple[str, ...]
    rate_hz: float
    first: NDArray[np.float32] | None = None

    def rows(self) -> list[dict[str, Any]]:
        """For each dimension: name, least and greatest command, the largest step from one tick to the next
        and per second, the first command, and the present pose before it."""
        if not len(self.commands):
            return []
        first = self.commands[0] if self.first is None else self.first
        steps = np.abs(np.diff(self.commands, axis=0, prepend=self.commands[:1])).max(0)
        return [
            {
                "name": name,
                "min": float(self.commands[:, i].min()),
                "max": float(self.commands[:, i].max()),
                "largest_step": float(steps[i]),
                "largest_speed": float(steps[i] * self.rate_hz),
                "first": float(first[i]),
                "present": None if self.pose is None else float(self.pose[i]),
            }
            for i, name in enumerate(self.names)
        ]

    def table(self) -> str:
        """Markdown."""
        rows = self.rows()
        if not rows:
            return "Nothing would have been sent."
        lines = [
            f"Nothing was sent. {len(self.commands)} commands would have been:",
            "",
            "| | min | max | largest step | per second | first | present pose |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        keys = ("min", "max", "largest_step", "largest_speed", "first", "present")
        for row in rows:
            cells = " | ".join("unknown" if row[key] is None else f"{row[key]:.4g}" for key in keys)
            lines.append(f"| {row['name']} | {cells} |")
        return "\n".join(lines)
