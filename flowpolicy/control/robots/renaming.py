"""A robot's observations under the policy's names and in the sizes of its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from flowpolicy.control.robot import TIMESTAMP, Observation, Robot
from flowpolicy.control.robots.passing import PassingRobot
from flowpolicy.errors import TaskError
from flowpolicy.features import Feature
from flowpolicy.features.resizing import resize_images
from flowpolicy.settings import choose


class RenamedRobot(PassingRobot):
    """A robot whose observations have the policy's names; images are resized to the policy's.

    A key that ``names`` does not mention is the robot's own of the same name; else the only one of its keys
    with the same last part, as the camera ``front`` is the policy's ``images.front``. An image of another
    size is resized as demonstrations are.

    Args:
        robot: any; its commands pass as they are.
        features: key -> feature of the policy.
        names: the policy's key -> the robot's, where they differ.

    Attributes:
        changes: whether there is anything to rename or resize.

    Raises:
        ConfigError: ``names`` mentions a key that the robot or the policy has not.
    """

    def __init__(
        self, robot: Robot, features: Mapping[str, Feature], names: Mapping[str, str] | None = None
    ) -> None:
        offered = robot.spec.observation_shapes
        self._names = _matched(features, offered, names or {}, robot.spec.name)
        self._sizes: dict[str, tuple[int, int]] = {}
        shapes: dict[str, Feature | tuple[int, ...]] = {}
        for key, own in self._names.items():
            shapes[key] = offered[own]
            if features[key].is_frame and (size := _resized(offered[own], features[key])) is not None:
                self._sizes[key] = size
                shapes[key] = features[key].shape
        used = {*self._names.values(), *features}
        shapes |= {own: shape for own, shape in offered.items() if own not in used}
        self.changes = bool(self._sizes) or any(key != own for key, own in self._names.items())
        super().__init__(robot, replace(robot.spec, observation_shapes=shapes))
        self._seen: tuple[Any, dict[str, Any]] = (None, {})

    def observe(self) -> Observation:
        """See :class:`~flowpolicy.control.robot.Robot`."""
        found = self.robot.observe()
        if not hasattr(found, "get"):
            return found  # the loop says what is wrong with it
        measured = found.get(TIMESTAMP)
        if measured is None or measured != self._seen[0]:  # a loop may be faster than its cameras
            self._seen = (measured, self._renamed(found))
        return self._seen[1]

    def _renamed(self, found: Observation) -> dict[str, Any]:
        offered = self.robot.spec.observation_shapes
        renamed = {key: value for key, value in found.items() if key not in offered}  # its time, ...
        for key, own in self._names.items():
            if own in found:  # the loop names what is missing
                size = self._sizes.get(key)
                renamed[key] = found[own] if size is None else resize_images(np.asarray(found[own]), size)
        return renamed


def _matched(
    features: Mapping[str, Feature], offered: Mapping[str, Any], names: Mapping[str, str], robot: str
) -> dict[str, str]:
    """The policy's key -> the robot's; what nothing fits is left out, for the check of the spec to name."""
    for key in names:
        choose(features, key, "robot.observations")
    found = {key: own for key, own in names.items() if choose(offered, own, f"robot.observations.{key}")}
    for key in features.keys() - found.keys():
        if key in offered:
            found[key] = key
            continue
        near = [own for own in offered if _last(own) == _last(key) and own not in features]
        if len(near) > 1:
            raise TaskError(
                f"{robot} has several observations that the policy's '{key}' may be: {', '.join(near)}; say "
                f"which: robot.observations={{{key}: {near[0]}}}."
            )
        if near:
            found[key] = near[0]
    return found


def _last(key: str) -> str:
    return key.replace("/", ".").rpartition(".")[2]


def _resized(offered: Feature | tuple[int, ...], wanted: Feature) -> tuple[int, int] | None:
    """Height and width to resize to; None where the sizes are the same, or the kinds are not."""
    shape = offered.shape if isinstance(offered, Feature) else tuple(offered)
    if (
        len(shape) != 3
        or shape == wanted.shape
        or shape[2] != wanted.shape[2]
        or wanted.dtype is not np.uint8
    ):
        return None
    return wanted.shape[0], wanted.shape[1]
