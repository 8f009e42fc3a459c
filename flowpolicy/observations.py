"""What a policy may observe: vectors of numbers, images, and which of several tasks is to be done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TASK = "task"
"""The key of a one-hot vector that says which of several tasks is to be done; it has a token of its own."""


def is_image(shape: Sequence[int]) -> bool:
    """Whether an observation of this shape is an image: height, width, and 1, 3 or 4 channels."""
    return len(shape) == 3 and shape[2] in (1, 3, 4)


def dtype_of(shape: Sequence[int]) -> type[np.generic]:
    """How an observation of this shape is kept: uint8 for an image, float32 for the rest."""
    return np.uint8 if is_image(shape) else np.float32
