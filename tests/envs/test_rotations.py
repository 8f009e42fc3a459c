"""Six numbers say the same as a quaternion, an axis and angle, or a matrix, and back."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from flowpolicy.errors import DataError
from flowpolicy_envs.rotations import (
    absolute_action_6d,
    absolute_action_axis_angle,
    absolute_demonstrations_6d,
    axis_angle_from_matrix,
    matrix_from_axis_angle,
    matrix_from_quaternion,
    matrix_from_rotation_6d,
    quaternion_from_matrix,
    rotation_6d_from_matrix,
)

# Random ones, none, half a turn about each axis (where a conversion by the trace alone loses everything),
# and near both.
VECTORS = np.concatenate(
    [
        Rotation.random(500, random_state=0).as_rotvec(),
        np.zeros((1, 3)),
        np.pi * np.eye(3),
        (np.pi - 1e-7) * np.eye(3),
        1e-7 * np.eye(3),
    ]
)


def _angle_between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (Rotation.from_matrix(first).inv() * Rotation.from_matrix(second)).magnitude()


def test_conversions_agree_with_scipy() -> None:
    rotation = Rotation.from_rotvec(VECTORS)
    matrix = rotation.as_matrix()
    np.testing.assert_allclose(matrix_from_axis_angle(VECTORS), matrix, atol=1e-12)
    np.testing.assert_allclose(matrix_from_quaternion(rotation.as_quat()), matrix, atol=1e-12)
    assert _angle_between(matrix_from_axis_angle(axis_angle_from_matrix(matrix)), matrix).max() < 1e-6
    quaternion = quaternion_from_matrix(matrix)
    assert (quaternion[:, 3] >= 0).all()
    np.testing.assert_allclose(np.abs((quaternion * rotation.as_quat()).sum(1)), 1.0, atol=1e-12)


def test_six_numbers_give_the_rotation_back_whatever_their_length() -> None:
    matrix = Rotation.from_rotvec(VECTORS).as_matrix()
    numbers = rotation_6d_from_matrix(matrix)
    np.testing.assert_allclose(matrix_from_rotation_6d(numbers), matrix, atol=1e-12)
    np.testing.assert_allclose(matrix_from_rotation_6d(3.0 * numbers), matrix, atol=1e-12)


@pytest.mark.parametrize("numbers", [np.zeros(6), np.ones(6), np.random.default_rng(0).normal(size=6)])
def test_any_six_numbers_give_a_rotation(numbers: np.ndarray) -> None:
    matrix = matrix_from_rotation_6d(numbers)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(matrix) == pytest.approx(1.0)


def test_six_numbers_are_continuous_where_axis_and_angle_jump() -> None:
    angles = np.pi + np.array([-1e-4, 1e-4])
    matrix = matrix_from_axis_angle(angles[:, None] * np.array([0.0, 0.0, 1.0]))
    assert np.abs(np.diff(axis_angle_from_matrix(matrix), axis=0)).max() > 6
    assert np.abs(np.diff(rotation_6d_from_matrix(matrix), axis=0)).max() < 1e-3


@pytest.mark.parametrize("arms", [1, 2])
def test_absolute_actions_survive_the_way_there_and_back(arms: int) -> None:
    rng = np.random.default_rng(1)
    vectors = VECTORS[: 2 * (len(VECTORS) // 2)].reshape(-1, arms, 3)
    action = np.concatenate(
        [rng.normal(size=(*vectors.shape[:2], 3)), vectors, rng.uniform(-1, 1, (*vectors.shape[:2], 1))], -1
    ).reshape(len(vectors), 7 * arms)
    wide = absolute_action_6d(action)
    assert wide.shape == (len(vectors), 10 * arms)
    back = absolute_action_axis_angle(wide).reshape(-1, 7)
    action = action.reshape(-1, 7)
    np.testing.assert_allclose(back[:, [0, 1, 2, 6]], action[:, [0, 1, 2, 6]])
    turn = _angle_between(matrix_from_axis_angle(back[:, 3:6]), matrix_from_axis_angle(action[:, 3:6]))
    assert turn.max() < 1e-6


def test_demonstrations_and_observations_are_converted_alike() -> None:
    quaternion = Rotation.random(4, random_state=2).as_quat()
    arrays = {"action": np.zeros((4, 7)), "robot0_eef_quat": quaternion, "object": np.zeros((4, 2))}
    made = absolute_demonstrations_6d(arrays)
    assert made["action"].shape == (4, 10)
    assert set(made) == {*arrays, "robot0_eef_rot6d"}
    # A quaternion and its negative are one orientation.
    flipped = absolute_demonstrations_6d({**arrays, "robot0_eef_quat": -quaternion})
    np.testing.assert_allclose(flipped["robot0_eef_rot6d"], made["robot0_eef_rot6d"], atol=1e-6)
    with pytest.raises(DataError, match="6 numbers, not 7 for each arm"):
        absolute_demonstrations_6d({"action": np.zeros((4, 6))})
