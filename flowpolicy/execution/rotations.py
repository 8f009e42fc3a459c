"""Averages of rotations: two that are nearly the same can have numbers that are far apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.policy.rotations import SIZES, from_matrix, matrix
from flowpolicy.ranges import NonNegativeInt, one_of
from flowpolicy.settings import Settings

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Rotation(Settings, prefix="rotation"):
    """Neighbouring dimensions of an action that are one absolute rotation.

    Small differences of rotations, as in ``delta`` poses, need no declaration: near zero they are numbers.

    Attributes:
        kind: one of :data:`~flowpolicy.policy.rotations.SIZES`.
        start: the first of its dimensions.
    """

    kind: Annotated[str, one_of(SIZES)]
    start: NonNegativeInt

    @property
    def dims(self) -> slice:
        """Its dimensions."""
        return slice(self.start, self.start + SIZES[self.kind])

    @staticmethod
    def of(starts: Mapping[str, Sequence[int]]) -> tuple[Rotation, ...]:
        """Those of a task or a policy, kind -> the first dimension of each."""
        return tuple(Rotation(kind, start) for kind, places in starts.items() for start in places)

    def mean(self, rows: Vector, weights: Vector) -> Vector:
        """The weighted mean of rotations, in the representation that is nearest to the last row.

        Angles by their unit vectors; rotation vectors and quaternions by their quaternions, of which the mean
        is the eigenvector of the largest eigenvalue of sum_i w_i q_i q_i^T (Markley et al. 2007, "Averaging
        Quaternions"); the others by their matrices, of which it is the rotation nearest to the sum. These two
        means are the same.

        Args:
            rows: ``(n, size)``.
            weights: ``(n,)``, positive.
        """
        if self.kind == "angle":
            mean = np.angle(weights @ np.exp(1j * rows[:, 0]))
            return np.array([rows[-1, 0] + np.angle(np.exp(1j * (mean - rows[-1, 0])))])
        if self.kind == "quaternion":
            mean = _eigenvector(
                rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), weights
            )
            return mean if mean @ rows[-1] >= 0 else -mean
        if self.kind in ("euler", "matrix6d"):
            return _matrix_mean(rows, weights, self.kind)
        return _vector(_eigenvector(np.stack([_quaternion(row) for row in rows]), weights), rows[-1])


def _matrix_mean(rows: Vector, weights: Vector, kind: str) -> Vector:
    matrices = matrix(torch.from_numpy(rows), kind).numpy()
    left, _, right = np.linalg.svd(np.einsum("n,nij->ij", weights, matrices))
    left[:, 2] *= np.sign(np.linalg.det(left @ right))
    mean: Vector = from_matrix(torch.from_numpy(left @ right), kind).numpy()
    if kind == "matrix6d":
        return mean
    roll, pitch, yaw = mean  # of the two ways to write it, and of full turns, what is nearest to the last row
    ways = np.array([[roll, pitch, yaw], [roll + np.pi, np.pi - pitch, yaw + np.pi]])
    ways += 2 * np.pi * np.round((rows[-1] - ways) / (2 * np.pi))
    nearest: Vector = ways[np.abs(ways - rows[-1]).sum(1).argmin()]
    return nearest


def _eigenvector(quaternions: Vector, weights: Vector) -> Vector:
    largest: Vector = np.linalg.eigh((quaternions.T * weights) @ quaternions)[1][:, -1]
    return largest


def _quaternion(vector: Vector) -> Vector:
    """(w, x, y, z) of a rotation vector; sinc keeps it exact near zero."""
    half = float(np.linalg.norm(vector)) / 2
    return np.concatenate([[np.cos(half)], 0.5 * np.sinc(half / np.pi) * vector])


def _vector(quaternion: Vector, near: Vector) -> Vector:
    """The rotation vector of a quaternion: of those a whole turn apart the one nearest to ``near``."""
    sine = float(np.linalg.norm(quaternion[1:]))
    if sine < 1e-12:
        length = float(np.linalg.norm(near))
        turns = np.round(length / (2 * np.pi))
        return near / length * turns * 2 * np.pi if turns else np.zeros(3)
    axis = quaternion[1:] / sine
    angle = 2 * np.arctan2(sine, quaternion[0])
    angle += 2 * np.pi * np.round((near @ axis - angle) / (2 * np.pi))
    vector: Vector = angle * axis
    return vector
