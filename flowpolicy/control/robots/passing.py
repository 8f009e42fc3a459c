"""What robots have in common that stand before another one."""

from __future__ import annotations

from typing import Any

from flowpolicy.control.robot import Action, Robot, RobotSpec


class PassingRobot:
    """Passes commands on to another robot; what it observes is for a subclass to say.

    Args:
        robot: the other one.
        spec: of what is observed; the other one's where None.
    """

    def __init__(self, robot: Robot, spec: RobotSpec | None = None) -> None:
        self.robot = robot
        self.spec = robot.spec if spec is None else spec

    def act(self, action: Action) -> None:
        """See :class:`~flowpolicy.control.robot.Robot`."""
        self.robot.act(action)

    @property
    def end_episode(self) -> Any:
        """The robot's; None where it has none."""
        return getattr(self.robot, "end_episode", None)

    def close(self) -> None:
        """See :class:`~flowpolicy.control.robot.Robot`."""
        self.robot.close()
