"""The kinds of undeclared observations, from key, element type and shape.

A shape alone says little: ``(2, 4, 4)`` is two poses as well as a tiny image. Importers tell here what a
column of a foreign file holds; the result is declared in what they write.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence

import numpy as np

from flowpolicy.features.feature import Feature
from flowpolicy.features.image import CHANNELS, Image
from flowpolicy.features.task import Task
from flowpolicy.features.vector import Vector

_SMALLEST_SIDE = 8  # pixels: nothing smaller is taken for a camera's image unless it is called one
_IMAGE_NAME = re.compile(r"(?<![a-z])(image|img|rgba?|pixels?)s?(?![a-z])", re.IGNORECASE)
_DEPTH_NAME = re.compile(r"(?<![a-z])(depth|disparity|segmentation|seg|mask)s?(?![a-z])", re.IGNORECASE)


class Kind(enum.StrEnum):
    """What the rows of an undeclared column look like; only vectors and images are taken unasked."""

    VECTOR = "vector"
    IMAGE = "image"
    DEPTH = "depth or label map"
    ENCODED = "encoded images or video"
    TEXT = "text"
    TIME = "dates or times"
    OTHER = "no plain numbers"


def undeclared(key: str, shape: Sequence[int], dtype: np.dtype[np.generic] | None = None) -> Feature:
    """The feature that a file without declared kinds means: ``(height, width, 1, 3 or 4)`` is an image, the
    key ``task`` the one-hot vector of the task, and all else a vector.

    Args:
        key: of the observation.
        shape: of one step.
        dtype: as a store has it; an image is of uint8 then, or called one. None: a checkpoint, which does not
            say.
    """
    shape = tuple(shape)
    is_image = len(shape) == 3 and shape[2] in CHANNELS
    if dtype is not None:
        is_image = kind_of(key, dtype, shape) is Kind.IMAGE
    if key == Task.name:
        return Task(shape)
    return Image(shape) if is_image else Vector(shape)


def features_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Feature]:
    """Features of which only the shapes are known, as in checkpoints of format 1; see :func:`undeclared`."""
    return {key: undeclared(key, shape) for key, shape in shapes.items()}


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
    if len(shape) == 2 or not (shape[0] in CHANNELS or shape[2] in CHANNELS):
        return Kind.VECTOR
    if _IMAGE_NAME.search(name) or (dtype == np.uint8 and is_large):
        return Kind.IMAGE
    return Kind.VECTOR


def is_quaternion(name: str, shape: Sequence[int]) -> bool:
    """Whether rows of this name and shape are orientations as unit quaternions."""
    return tuple(shape[-1:]) == (4,) and re.search(r"quat", name, re.IGNORECASE) is not None
