import numpy as np
import pytest
import torch

from flowpolicy.execution.rotations import Rotation
from flowpolicy.policy.rotations import SIZES, decoded, encoded, from_matrix, inner_size, matrix

SOLID = [kind for kind in SIZES if kind != "angle"]
GENERATOR = torch.Generator().manual_seed(0)
QUATERNIONS = torch.nn.functional.normalize(
    torch.randn(200, 4, generator=GENERATOR, dtype=torch.float64), dim=-1
)


def special():
    """Rotations at which a representation is at its limits, among random ones."""
    turns = torch.tensor(
        [[0, 0, 0], [np.pi, 0, 0], [0, np.pi, 0], [0, 0, -np.pi], [0, np.pi / 2, 0.3], [0.4, -np.pi / 2, 0],
         [1e-9, 0, 0]], dtype=torch.float64,
    )  # fmt: skip
    return torch.cat(
        [matrix(turns, "euler"), matrix(turns, "rotation_vector"), matrix(QUATERNIONS, "quaternion")]
    )


@pytest.mark.parametrize("kind", SOLID)
def test_every_representation_is_a_rotation_and_comes_back(kind):
    rotations = special()
    again = matrix(from_matrix(rotations, kind), kind)
    assert torch.allclose(again, rotations, atol=1e-7)
    assert torch.allclose(again @ again.mT, torch.eye(3, dtype=torch.float64).expand_as(again), atol=1e-9)
    assert torch.allclose(torch.linalg.det(again), torch.ones(len(again), dtype=torch.float64))
    inside = encoded(from_matrix(rotations, kind), kind)
    assert inside.shape == (len(rotations), inner_size(kind))
    assert torch.allclose(matrix(decoded(inside, kind), kind), rotations, atol=1e-6)


def test_the_kinds_agree_on_turns_about_the_axes():
    for axis in range(3):
        vector = torch.zeros(3, dtype=torch.float64)
        vector[axis] = 0.7
        quaternion = torch.cat([vector / 0.7 * np.sin(0.35), torch.tensor([np.cos(0.35)])])
        for values, kind in ((vector, "euler"), (quaternion, "quaternion")):
            assert torch.allclose(matrix(values, kind), matrix(vector, "rotation_vector"))
    x, y, z = (matrix(part, "euler") for part in torch.diag(torch.tensor([0.3, -0.8, 2.0])))
    assert torch.allclose(matrix(torch.tensor([0.3, -0.8, 2.0]), "euler"), z @ y @ x, atol=1e-6)
    assert matrix(torch.tensor([0.0, 0.0, np.pi / 2]), "euler")[1, 0] == pytest.approx(1)  # x turns to y


@pytest.mark.parametrize("kind", SIZES)
def test_whatever_a_network_gives_becomes_a_rotation(kind):
    size = inner_size(kind)
    numbers = torch.randn(50, size, generator=GENERATOR)
    numbers[0], numbers[1] = 0.0, 1.0  # none at all, and two parallel vectors
    numbers[2] = torch.tensor([1.0, 0, 0, -2.0, 0, 0])[:size]
    values = decoded(numbers, kind)
    assert values.shape == (50, SIZES[kind])
    assert torch.isfinite(values).all()
    if kind == "quaternion":
        assert torch.allclose(values.norm(dim=-1), torch.ones(50), atol=1e-6)
    if kind == "matrix6d":
        assert torch.allclose(encoded(values, kind), values, atol=1e-6)


def test_a_whole_turn_has_no_jump_inside():
    angles = torch.linspace(0, 4 * np.pi, 400, dtype=torch.float64)[:, None]
    axis = torch.nn.functional.normalize(torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64))
    for inside in (encoded(angles, "angle"), encoded(angles * axis, "rotation_vector")):
        assert (inside.diff(dim=0).norm(dim=-1) < 0.07).all()


@pytest.mark.parametrize("kind", ["euler", "matrix6d", "quaternion", "rotation_vector"])
def test_fusion_finds_the_same_mean_in_every_representation(kind):
    quaternions = QUATERNIONS[:1] + 0.2 * QUATERNIONS[1:6]
    rotations = matrix(quaternions, "quaternion")
    weights = np.array([1.0, 0.5, 2.0, 1.0, 0.1])
    means = [
        matrix(
            torch.from_numpy(Rotation(other, 0).mean(from_matrix(rotations, other).numpy(), weights)), other
        )
        for other in (kind, "quaternion")
    ]
    assert torch.allclose(*means, atol=1e-9)


def test_the_mean_of_euler_angles_stays_near_the_last_row():
    rows = np.array([[3.1, 0.1, 0.0], [-3.1, 0.1, 0.0], [3.2, 0.1, 0.0]])
    mean = Rotation("euler", 0).mean(rows, np.ones(3))
    assert mean == pytest.approx([3.1 + (2 * np.pi - 6.2) / 3 + 0.1 / 3, 0.1, 0.0], abs=0.02)
