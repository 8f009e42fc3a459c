"""The probability path: straight lines from noise (t = 0) to data (t = 1)."""

from __future__ import annotations

from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B,)`` so that it broadcasts over ``like`` ``(B, ...)``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def interpolate(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t x_1 for noise and data ``(B, ...)`` and times ``(B,)``."""
    weight = per_sample(t, data)
    return (1 - weight) * noise + weight * data


def velocity_target(noise: Tensor, data: Tensor) -> Tensor:
    """d x_t / dt = x_1 - x_0, constant along the line."""
    return data - noise
