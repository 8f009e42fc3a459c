"""The statistics that LeRobot keeps beside a dataset, of the whole and of each episode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Statistics = dict[str, Any]
_DEPTHS = 1 << 12  # of an episode that its statistics look at
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def vector_statistics(values: NDArray[Any]) -> Statistics:
    """Of numbers ``(steps, ...)``, dimension by dimension, in the shape of a row."""
    values = values.reshape(len(values), -1) if values.ndim == 1 else values
    wide = values.astype(np.float64)
    quantiles = np.quantile(wide, list(_QUANTILES.values()), axis=0)
    found = {
        "min": wide.min(axis=0),
        "max": wide.max(axis=0),
        "mean": wide.mean(axis=0),
        "std": wide.std(axis=0),
    }
    found |= dict(zip(_QUANTILES, quantiles, strict=True))
    return {**{name: value.tolist() for name, value in found.items()}, "count": [len(values)]}


def depth_sample(maps: NDArray[Any], steps: NDArray[Any]) -> NDArray[Any]:
    """Some depths of the maps ``(steps, height, width, ...)``, which stand for all, ``(n, 1, 1, ...)``.

    Args:
        maps: of an episode, or more.
        steps: those that are looked at, in each at about as many pixels.
    """
    height, width = maps.shape[1:3]
    stride = max(1, round((len(steps) * height * width / _DEPTHS) ** 0.5))
    sampled = [maps[step][::stride, ::stride] for step in steps]
    return np.asarray(np.stack(sampled).reshape(-1, *[1] * (maps.ndim - 1)))


def pixel_counts(images: Iterable[NDArray[np.uint8]], channels: int) -> NDArray[np.int64]:
    """How often each of the 256 values occurs in each channel of some images, ``(channels, 256)``."""
    counts = np.zeros((channels, 256), np.int64)
    for image in images:
        for channel in range(channels):
            counts[channel] += np.bincount(image[..., channel].reshape(-1), minlength=256)
    return counts


def pixel_statistics(counts: NDArray[np.int64], frames: int) -> Statistics:
    """Of images, from 0 to 1 and channel by channel, ``(channels, 1, 1)``.

    Args:
        counts: see :func:`pixel_counts`.
        frames: that were looked at.
    """
    levels = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    found = {
        "min": levels[(counts > 0).argmax(axis=1)],
        "max": levels[255 - (counts[:, ::-1] > 0).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(shares @ levels**2 - mean**2, 0)),
    }
    below = np.cumsum(shares, axis=1)
    for name, share in _QUANTILES.items():
        found[name] = levels[(below >= share - 1e-12).argmax(axis=1)]
    return {**{name: value.reshape(-1, 1, 1).tolist() for name, value in found.items()}, "count": [frames]}
