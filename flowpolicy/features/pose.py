"""Poses: positions and orientations in space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.errors import ConfigError
from flowpolicy.features.feature import FEATURE_KINDS, Feature
from flowpolicy.plugins import register

_TOLERANCE = 1e-2
"""How far a rotation may be from orthonormal, and a quaternion from unit length: sensors round."""


@register(FEATURE_KINDS)
@dataclass(frozen=True)
class Pose(Feature):
    """One pose or several: homogeneous matrices ``(..., 4, 4)``, or ``(..., 7)`` of position and quaternion.

    A network reads the position, normalised by the demonstrations, and the first two columns of the rotation
    matrix, which vary continuously with the orientation (Zhou et al. 2019, "On the continuity of rotation
    representations in neural networks").

    Attributes:
        scalar_first: quaternions are (w, x, y, z), as MuJoCo has them, and not (x, y, z, w).
    """

    scalar_first: bool = False

    name: ClassVar[str] = "pose"

    def check_declaration(self, key: str) -> None:
        """Refuse other shapes."""
        super().check_declaration(key)
        if self.shape[-2:] != (4, 4) and self.shape[-1:] != (7,):
            raise ConfigError(
                f"Observation '{key}' of shape {self.shape} is declared a pose; give (4, 4) or (k, 4, 4) of "
                "homogeneous matrices, or 7 numbers of position and quaternion."
            )

    @property
    def is_matrix(self) -> bool:
        """Whether poses are matrices."""
        return self.shape[-1] == 4

    def problem(self, values: Tensor | NDArray[Any]) -> str:
        """Not finite, or an orientation that is none."""
        problem = super().problem(values)
        if problem:
            return problem
        poses = torch.as_tensor(values)
        if not self.is_matrix:
            is_unit = bool(((poses[..., 3:].norm(dim=-1) - 1).abs() < _TOLERANCE).all())
            return "" if is_unit else "holds quaternions that are not of unit length; normalise them"
        rotation, last = poses[..., :3, :3], poses.new_tensor([0.0, 0.0, 0.0, 1.0])
        error = (rotation.mT @ rotation - torch.eye(3, device=poses.device)).abs().amax()
        is_rigid = bool(error < _TOLERANCE) and bool((torch.linalg.det(rotation) > 0).all())
        if is_rigid and bool(((poses[..., 3, :] - last).abs() < _TOLERANCE).all()):
            return ""
        return "holds matrices that are no poses; give rotations and a last row of 0, 0, 0, 1"

    def normalized(self) -> NDArray[np.bool_]:
        """The positions."""
        entries = np.zeros(self.shape, bool)
        if self.is_matrix:
            entries[..., :3, 3] = True
        else:
            entries[..., :3] = True
        return entries

    def resting(self) -> NDArray[Any]:
        """At the origin, not turned."""
        if self.is_matrix:
            return np.broadcast_to(np.eye(4, dtype=np.float32), self.shape).copy()
        pose = np.zeros(self.shape, np.float32)
        pose[..., 3 if self.scalar_first else 6] = 1
        return pose

    def random(self, leading: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Any position and orientation."""
        poses = torch.as_tensor(self.resting()).expand(*leading, *self.shape).clone()
        position = poses[..., :3, 3] if self.is_matrix else poses[..., :3]
        position.copy_(torch.rand(position.shape, generator=generator) * 2 - 1)
        quaternion = torch.randn((*position.shape[:-1], 4), generator=generator)
        quaternion = quaternion / quaternion.norm(dim=-1, keepdim=True)
        if self.is_matrix:
            poses[..., :3, :3] = torch.stack(_axes(quaternion, self.scalar_first), dim=-1)
        else:
            poses[..., 3:] = quaternion
        return poses

    @property
    def size(self) -> int:
        """Nine numbers a pose."""
        return 9 * math.prod(self.shape[: -2 if self.is_matrix else -1])

    def numbers(self, values: Tensor) -> Tensor:
        """Position, and the first two columns of the rotation."""
        if self.is_matrix:
            parts = values[..., :3, 3], values[..., :3, 0], values[..., :3, 1]
        else:
            parts = values[..., :3], *_axes(values[..., 3:], self.scalar_first)[:2]
        return torch.cat(parts, dim=-1).flatten(2)


def _axes(quaternion: Tensor, scalar_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of the rotation matrix, each ``(..., 3)``, of a unit quaternion ``(..., 4)``."""
    parts = quaternion.unbind(-1)
    w, x, y, z = parts if scalar_first else (parts[3], *parts[:3])
    return (
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)], dim=-1),
        torch.stack([2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w)], dim=-1),
        torch.stack([2 * (x * z + y * w), 2 * (y * z - x * w), 1 - 2 * (x * x + y * y)], dim=-1),
    )
