"""Rotations as actions name them, and as a network learns them: numbers without jumps.

Inside, an angle is its cosine and sine, and any other rotation the first two columns of its matrix (Zhou et
al. 2019, "On the continuity of rotation representations in neural networks"). Whatever numbers a network
gives for them are made a frame by Gram and Schmidt's method, so that what comes out is a rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZES = {"angle": 1, "rotation_vector": 3, "quaternion": 4, "euler": 3, "matrix6d": 6}
"""Numbers of each kind of rotation: an angle in rad; axis times angle in rad; a unit quaternion, (x, y, z, w)
or (w, x, y, z); roll, pitch and yaw in rad about the fixed axes x, y and z; two columns of the matrix."""
_TINY = 1e-12


def inner_size(kind: str) -> int:
    """Numbers of a rotation inside."""
    return 2 if kind == "angle" else 6


def encoded(values: Tensor, kind: str) -> Tensor:
    """Rotations ``(..., SIZES[kind])`` as a network learns them, ``(..., inner_size(kind))``."""
    if kind == "angle":
        return torch.cat([values.cos(), values.sin()], -1)
    return matrix(values, kind)[..., :2].transpose(-1, -2).flatten(-2)


def decoded(values: Tensor, kind: str) -> Tensor:
    """The inverse of :func:`encoded`, of any numbers: quaternions of unit length with the last number not
    negative, rotation vectors of at most half a turn."""
    if kind == "angle":
        return torch.atan2(values[..., 1:], values[..., :1])
    return from_matrix(_frame(values), kind)


def matrix(values: Tensor, kind: str) -> Tensor:
    """Rotation matrices ``(..., 3, 3)`` of any kind but an angle."""
    if kind == "matrix6d":
        return _frame(values)
    if kind == "euler":
        (cr, cp, cy), (sr, sp, sy) = values.cos().unbind(-1), values.sin().unbind(-1)
        rows = (
            (cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr),
            (sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr),
            (-sp, cp * sr, cp * cr),
        )
        return torch.stack([torch.stack(row, -1) for row in rows], -2)
    if kind == "rotation_vector":
        half = values.norm(dim=-1, keepdim=True) / 2
        values = torch.cat([0.5 * torch.sinc(half / torch.pi) * values, half.cos()], -1)
    x, y, z, w = (values / values.norm(dim=-1, keepdim=True).clamp(min=_TINY)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def from_matrix(rotation: Tensor, kind: str) -> Tensor:
    """The inverse of :func:`matrix`."""
    if kind == "matrix6d":
        return rotation[..., :2].transpose(-1, -2).flatten(-2)
    if kind == "euler":
        return _euler(rotation)
    quaternion = _quaternion(rotation)
    if kind == "quaternion":
        return quaternion
    sine = quaternion[..., :3].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, quaternion[..., 3:])
    return quaternion[..., :3] * torch.where(sine < 1e-6, 2.0, angle / sine.clamp(min=1e-6))


def _frame(values: Tensor) -> Tensor:
    """The rotation ``(..., 3, 3)`` whose first column is along the first of two vectors ``(..., 6)``, and the
    second in their plane."""
    first, second = values[..., :3], values[..., 3:]
    x = _unit(first, _axis(first, 0))
    y = second - (x * second).sum(-1, keepdim=True) * x
    # Of two parallel vectors any perpendicular one will do: one far from the first.
    spare = torch.linalg.cross(x, torch.where(x[..., :1].abs() < 0.7, _axis(x, 0), _axis(x, 1)), dim=-1)
    y = _unit(y, _unit(spare, spare))
    return torch.stack([x, y, torch.linalg.cross(x, y, dim=-1)], -1)


def _unit(vectors: Tensor, otherwise: Tensor) -> Tensor:
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-6, vectors / length.clamp(min=1e-6), otherwise)


def _axis(like: Tensor, number: int) -> Tensor:
    """The unit vector of an axis, made without a copy from the CPU."""
    zero = torch.zeros_like(like[..., 0])
    return torch.stack([zero + 1 if place == number else zero for place in range(3)], -1)


def _quaternion(rotation: Tensor) -> Tensor:
    """(x, y, z, w) with w >= 0, from the largest of the four: the others are divided by it."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in rotation.unbind(-2))
    squares = torch.stack([1 + a - e - i, 1 - a + e - i, 1 - a - e + i, 1 + a + e + i], -1)
    candidates = torch.stack(
        [
            torch.stack([squares[..., 0], d + b, c + g, h - f], -1),
            torch.stack([d + b, squares[..., 1], f + h, c - g], -1),
            torch.stack([c + g, f + h, squares[..., 2], d - b], -1),
            torch.stack([h - f, c - g, d - b, squares[..., 3]], -1),
        ],
        -2,
    )
    index = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    chosen = candidates.gather(-2, index).squeeze(-2)
    quaternion = chosen / chosen.norm(dim=-1, keepdim=True).clamp(min=_TINY)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def _euler(rotation: Tensor) -> Tensor:
    """Roll, pitch and yaw; no roll with the pitch at a quarter turn, where only a sum of both counts."""
    sine = -rotation[..., 2, 0]
    locked = sine.abs() > 1 - 1e-6
    roll = torch.atan2(rotation[..., 2, 1], rotation[..., 2, 2])
    yaw = torch.atan2(rotation[..., 1, 0], rotation[..., 0, 0])
    alone = torch.atan2(-rotation[..., 0, 1], rotation[..., 1, 1])
    pitch = torch.asin(sine.clamp(-1, 1))
    return torch.stack([torch.where(locked, 0.0, roll), pitch, torch.where(locked, alone, yaw)], -1)
