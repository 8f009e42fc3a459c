"""Orientations as six numbers: the first two columns of the rotation matrix (Zhou et al. 2019).

Axis-angle vectors jump by a full turn and quaternions by their sign; these six numbers are continuous, so a
network learns them more easily. Demonstrations and environments are converted by the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flowpolicy.errors import DataError

_TINY = 1e-8
ARM_ACTION = 7  # position, axis-angle, gripper
ARM_ACTION_6D = 10  # position, six numbers, gripper


def matrix_from_rotation_6d(numbers: np.ndarray) -> np.ndarray:
    """Rotation matrices ``(..., 3, 3)`` from ``(..., 6)`` of any length, by Gram-Schmidt.

    Source: Zhou et al. 2019, "On the Continuity of Rotation Representations", equation 15. Two columns that
    are parallel or zero say nothing; the missing directions are then chosen arbitrarily.
    """
    numbers = np.asarray(numbers, dtype=np.float64)
    first = _unit(numbers[..., :3], np.array([1.0, 0.0, 0.0]))
    second = numbers[..., 3:] - (first * numbers[..., 3:]).sum(-1, keepdims=True) * first
    # The axis in which the first column is smallest is never parallel to it.
    spare = np.eye(3)[np.abs(first).argmin(axis=-1)]
    spare = spare - (first * spare).sum(-1, keepdims=True) * first
    second = _unit(second, spare)
    second = _unit(second - (first * second).sum(-1, keepdims=True) * first, spare)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def rotation_6d_from_matrix(matrix: np.ndarray) -> np.ndarray:
    """``(..., 6)``: the first column of ``(..., 3, 3)``, then the second."""
    matrix = np.asarray(matrix)
    return np.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1)


def matrix_from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """Rotation matrices ``(..., 3, 3)`` from quaternions ``(..., 4)`` with the real part last."""
    q = np.asarray(quaternion, dtype=np.float64)
    x, y, z, w = np.moveaxis(_unit(q, np.array([0.0, 0.0, 0.0, 1.0])), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_from_axis_angle(vector: np.ndarray) -> np.ndarray:
    """Rotation matrices ``(..., 3, 3)`` from axis times angle ``(..., 3)``, rad."""
    vector = np.asarray(vector, dtype=np.float64)
    angle = np.linalg.norm(vector, axis=-1, keepdims=True)
    # sin(a/2)/a, which is 1/2 at a = 0
    scale = 0.5 * np.sinc(angle / (2 * np.pi))
    return matrix_from_quaternion(np.concatenate([scale * vector, np.cos(angle / 2)], axis=-1))


def axis_angle_from_matrix(matrix: np.ndarray) -> np.ndarray:
    """Axis times angle ``(..., 3)``, rad, the angle in [0, pi], from ``(..., 3, 3)``."""
    quaternion = quaternion_from_matrix(matrix)
    imaginary = quaternion[..., :3]
    sine = np.linalg.norm(imaginary, axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, quaternion[..., 3:])
    scale = np.where(sine > _TINY, angle / np.maximum(sine, _TINY), 2.0)
    return np.asarray(scale * imaginary)


def quaternion_from_matrix(matrix: np.ndarray) -> np.ndarray:
    """Quaternions ``(..., 4)``, real part last and not negative, from ``(..., 3, 3)``.

    Each of the four numbers could be divided by; the largest is (Shepperd 1978), so that nothing is lost
    near half a turn.
    """
    m = np.asarray(matrix, dtype=np.float64)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    yz, zx, xy = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    sxy, szx, syz = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    # Row i is 4 q_i (x, y, z, w): four estimates of the same quaternion, scaled by its own components.
    rows = np.stack(
        [
            np.stack([1 + xx - yy - zz, sxy, szx, yz], axis=-1),
            np.stack([sxy, 1 - xx + yy - zz, syz, zx], axis=-1),
            np.stack([szx, syz, 1 - xx - yy + zz, xy], axis=-1),
            np.stack([yz, zx, xy, 1 + xx + yy + zz], axis=-1),
        ],
        axis=-2,
    )
    best = np.stack([rows[..., i, i] for i in range(4)], axis=-1).argmax(axis=-1)
    chosen = np.take_along_axis(rows, best[..., None, None], axis=-2)[..., 0, :]
    quaternion = _unit(chosen, np.array([0.0, 0.0, 0.0, 1.0]))
    return np.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def absolute_action_6d(action: np.ndarray) -> np.ndarray:
    """Absolute arm actions ``(..., 7 n)`` of n arms as ``(..., 10 n)``: position, six numbers, gripper."""
    arms = _arms(action, ARM_ACTION)
    rotation = rotation_6d_from_matrix(matrix_from_axis_angle(arms[..., 3:6]))
    joined = np.concatenate([arms[..., :3], rotation, arms[..., 6:]], axis=-1)
    return joined.reshape(*action.shape[:-1], -1)


def absolute_action_axis_angle(action: np.ndarray) -> np.ndarray:
    """The inverse of :func:`absolute_action_6d`: ``(..., 10 n)`` as ``(..., 7 n)``."""
    arms = _arms(action, ARM_ACTION_6D)
    rotation = axis_angle_from_matrix(matrix_from_rotation_6d(arms[..., 3:9]))
    joined = np.concatenate([arms[..., :3], rotation, arms[..., 9:]], axis=-1)
    return joined.reshape(*action.shape[:-1], -1)


def with_rotation_6d(observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``observation`` with ``<name>_eef_rot6d`` ``(..., 6)`` beside each ``<name>_eef_quat`` ``(..., 4)``."""
    added = {
        key.removesuffix("quat") + "rot6d": rotation_6d_from_matrix(matrix_from_quaternion(value)).astype(
            np.float32
        )
        for key, value in observation.items()
        if key.endswith("_eef_quat")
    }
    return {**observation, **added}


def absolute_demonstrations_6d(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A ``demo_transform``: absolute actions and orientations of the hand as six numbers each.

    Raises:
        DataError: actions that are not seven numbers for each arm.
    """
    action = absolute_action_6d(arrays["action"]).astype(np.float32)
    return {**with_rotation_6d(arrays), "action": action}


def _arms(action: np.ndarray, size: int) -> np.ndarray:
    action = np.asarray(action)
    if action.shape[-1] % size:
        raise DataError(
            f"An action has {action.shape[-1]} numbers, not {size} for each arm; "
            "choose demonstrations and a task with the same kind of actions."
        )
    return action.reshape(*action.shape[:-1], -1, size)


def _unit(vector: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """``vector`` over its length; where it has none, ``spare`` over its."""
    vector = np.where(np.linalg.norm(vector, axis=-1, keepdims=True) > _TINY, vector, spare)
    return np.asarray(vector / np.linalg.norm(vector, axis=-1, keepdims=True))
