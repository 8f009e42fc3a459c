"""What a column of demonstrations holds: a vector, an image, a depth map, text; by what is declared of it.

The declaration is the column's element type, its name, and what the format or the user says of it. A shape
alone decides nothing: ``(2, 4, 4)`` is two poses as well as a tiny image.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

import numpy as np

_CHANNELS = (1, 3, 4)
_SMALLEST_SIDE = 8  # pixels: nothing smaller is taken for a camera's image unless it is called one
_IMAGE_NAME = re.compile(r"(?<![a-z])(image|img|rgba?|pixels?)s?(?![a-z])", re.IGNORECASE)
_DEPTH_NAME = re.compile(r"(?<![a-z])(depth|disparity|segmentation|seg|mask)s?(?![a-z])", re.IGNORECASE)


class Kind(enum.StrEnum):
    """What the rows of a column are; only vectors and images can be observed by a policy."""

    VECTOR = "vector"
    IMAGE = "image"
    DEPTH = "depth or label map"
    ENCODED = "encoded images or video"
    TEXT = "text"
    TIME = "dates or times"
    OTHER = "no plain numbers"


USABLE = (Kind.VECTOR, Kind.IMAGE)


def kind_of(name: str, dtype: np.dtype[np.generic], shape: Sequence[int]) -> Kind:
    """The kind of a plain array, from the element type and the name that it is stored with.

    Args:
        name: of the array, as ``obs/agentview_image``.
        dtype: of its elements.
        shape: of one row.
    """
    if dtype.kind in "SUT":
        return Kind.TEXT
    if dtype.kind in "mM":
        return Kind.TIME
    if dtype.kind not in "fiub":
        return Kind.OTHER
    if len(shape) not in (2, 3) or dtype.kind == "b":
        return Kind.VECTOR
    is_large = sorted(shape)[-2] >= _SMALLEST_SIDE
    if is_large and (_DEPTH_NAME.search(name) or (dtype.kind in "iu" and dtype.itemsize > 1)):
        return Kind.DEPTH
    if len(shape) == 2 or not (shape[0] in _CHANNELS or shape[2] in _CHANNELS):
        return Kind.VECTOR
    if _IMAGE_NAME.search(name) or (dtype == np.uint8 and is_large):
        return Kind.IMAGE
    return Kind.VECTOR


def channels_first(shape: Sequence[int]) -> bool:
    """Whether images of this shape are (channels, height, width); channels last where both would do."""
    return shape[0] in _CHANNELS and shape[-1] not in _CHANNELS


def is_quaternion(name: str, shape: Sequence[int]) -> bool:
    """Whether rows of this name and shape are orientations as unit quaternions."""
    return tuple(shape[-1:]) == (4,) and re.search(r"quat", name, re.IGNORECASE) is not None
