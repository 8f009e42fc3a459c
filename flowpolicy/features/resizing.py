"""Images at another size, the same for demonstrations and for a robot's camera."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F


def resize_images(images: NDArray[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Images ``(..., H, W, channels)`` of uint8 as ``(..., height, width, channels)``.

    Bilinear, averaged over the pixels that become one (antialiased); the proportions may change.

    Args:
        images: channels last.
        size: height and width.
    """
    *leading, height, width, channels = images.shape
    if (height, width) == tuple(size):
        return np.asarray(images, np.uint8)
    first = torch.as_tensor(np.ascontiguousarray(images)).reshape(-1, height, width, channels)
    resized = F.interpolate(first.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).reshape(*leading, *size, channels).contiguous().numpy()
