"""What a policy observes: features, each of a kind that is declared and never guessed from its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flowpolicy.observations import TASK, is_image


@dataclass(frozen=True)
class Feature:
    """One observation key.

    Attributes:
        kind: name of its kind: ``vector``, ``image``, ``task``.
        shape: of one step.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> type[np.generic]:
        """How its values are kept: uint8 of an image, float32 of the rest."""
        return np.uint8 if self.kind == "image" else np.float32


def features_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Feature]:
    """Features of which only the shapes are known, as in files of format 1."""
    return {
        key: Feature("task" if key == TASK else "image" if is_image(shape) else "vector", tuple(shape))
        for key, shape in shapes.items()
    }
