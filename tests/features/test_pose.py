"""Poses."""

import numpy as np
import pytest
import torch
from kinds import check_kind, policy_of
from scipy.spatial.transform import Rotation

from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.features import Pose


def poses(steps=9, count=2):
    """The same poses as matrices ``(steps, count, 4, 4)`` and as 7 numbers, scalar last."""
    rng = np.random.default_rng(0)
    rotations = Rotation.random(steps * count, rng)
    position = rng.uniform(1, 5, (steps, count, 3))
    matrices = np.tile(np.eye(4), (steps, count, 1, 1))
    matrices[..., :3, :3] = rotations.as_matrix().reshape(steps, count, 3, 3)
    matrices[..., :3, 3] = position
    quaternions = rotations.as_quat().reshape(steps, count, 4)
    return matrices, np.concatenate([position, quaternions], -1)


@pytest.mark.parametrize(("shape", "number"), [((2, 4, 4), 0), ((2, 7), 1)])
def test_poses_are_a_whole_observation(shape, number, tmp_path):
    check_kind(Pose(shape), poses()[number], tmp_path)


@pytest.mark.parametrize("shape", [(4, 4), (7,)])
def test_one_pose_is_a_whole_observation(shape, tmp_path):
    check_kind(Pose(shape), poses(count=1)[len(shape) == 1][:, 0], tmp_path)


@pytest.mark.parametrize("scalar_first", [False, True])
def test_a_network_reads_the_same_of_matrices_and_quaternions(scalar_first):
    matrices, numbers = poses()
    if scalar_first:
        numbers = numbers[..., [0, 1, 2, 6, 3, 4, 5]]
    read = []
    for feature, data in ((Pose((2, 4, 4)), matrices), (Pose((2, 7), scalar_first), numbers)):
        policy = policy_of({"pose": feature}, {"pose": data})
        normalized = policy.normalize_observations({"pose": data[None, :2]})["pose"]
        read.append(feature.numbers(normalized))
        assert read[-1].shape == (1, 2, feature.size) == (1, 2, 18)
    torch.testing.assert_close(read[0], read[1])
    position = read[0].view(2, 2, 9)[..., :3]
    assert position.abs().max() <= 1
    rotation = torch.as_tensor(matrices[:2, :, :3, :2]).mT.flatten(2)  # the first two columns
    torch.testing.assert_close(read[0].view(2, 2, 9)[..., 3:].double(), rotation, atol=1e-5, rtol=0)


def mirrored(pose):
    return pose * np.array([1, 1, -1, 1])


@pytest.mark.parametrize(
    "spoil",
    [mirrored, lambda pose: 1.1 * pose, lambda pose: pose.swapaxes(-1, -2), lambda pose: pose * np.nan],
)
def test_matrices_that_are_no_poses_are_refused(spoil):
    matrices, _ = poses()
    policy = policy_of({"pose": Pose((2, 4, 4))}, {"pose": matrices})
    policy.act({"pose": matrices[None, :2]})
    with pytest.raises(FlowPolicyError, match="'pose' holds"):
        policy.act({"pose": spoil(matrices)[None, :2]})


def test_quaternions_have_unit_length():
    _, numbers = poses()
    policy = policy_of({"pose": Pose((2, 7))}, {"pose": numbers})
    with pytest.raises(FlowPolicyError, match="quaternions that are not of unit length"):
        policy.act({"pose": 1.1 * numbers[None, :2]})


@pytest.mark.parametrize("shape", [(3,), (4, 3), ()])
def test_what_is_no_pose_is_refused(shape):
    with pytest.raises(ConfigError, match="is declared a pose; give"):
        policy_of({"tool": Pose(shape)})
