"""A robot that is told in words what to do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flowpolicy.control.robot import Observation, Robot
from flowpolicy.control.robots.passing import PassingRobot
from flowpolicy.errors import ConfigError
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.features import TextFeature

log = logging.getLogger(__name__)


class InstructedRobot(PassingRobot):
    """A robot whose observations also hold an instruction, in place of its own of these keys.

    ``instruction`` may be assigned from any thread while a loop runs: the next chunk does it.

    Args:
        robot: that is controlled.
        texts: key -> feature of the policy's that reads it.
        instruction: what to do.

    Raises:
        ConfigError: it is no text that can be read.
    """

    def __init__(self, robot: Robot, texts: Mapping[str, TextFeature], instruction: str) -> None:
        shapes: dict[str, Any] = {**robot.spec.observation_shapes, **dict.fromkeys(texts, ())}
        super().__init__(robot, replace(robot.spec, observation_shapes=shapes))
        self._texts = dict(texts)
        self.instruction = instruction

    @property
    def instruction(self) -> str:
        """What to do."""
        return self._instruction

    @instruction.setter
    def instruction(self, text: str) -> None:
        for feature in self._texts.values():  # read here once, since that may take longer than a tick
            try:
                feature.array(text)
            except ValueError as error:
                raise ConfigError(f"task {error}.") from error
        self._instruction = text

    def observe(self) -> Observation:
        """The robot's observation, and the instruction."""
        observation: Any = self.robot.observe()
        if not isinstance(observation, Mapping):  # the loop says so
            return observation  # type: ignore[no-any-return]
        return {**observation, **dict.fromkeys(self._texts, self._instruction)}


def instructed(robot: Robot, policy: ChunkPolicy, instruction: str | None) -> Robot:
    """The robot with an instruction for the policy; without one, what the policy was trained with where that
    is a single text and the robot says none, else the robot as it is.

    Raises:
        ConfigError: an instruction for a policy that reads none.
    """
    texts = {key: each for key, each in policy.spec.features.items() if isinstance(each, TextFeature)}
    if instruction is not None and not texts:
        raise ConfigError("The policy reads no words; leave out task=, or train it with a text observation.")
    if instruction is None:
        texts = {key: each for key, each in texts.items() if key not in robot.spec.observation_shapes}
        known = {text for feature in texts.values() for text in feature.known}
        if len(known) != 1:
            return robot  # which the loop refuses where something is missing
        instruction = known.pop()
        log.info("The policy knows one task, '%s'; task= says another.", instruction)
    return InstructedRobot(robot, texts, instruction)
