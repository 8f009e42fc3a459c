"""Vectors: joint angles, velocities, forces; any numbers that are normalised one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowpolicy.errors import ConfigError
from flowpolicy.features.feature import FEATURE_KINDS, Feature
from flowpolicy.plugins import register


@register(FEATURE_KINDS)
@dataclass(frozen=True)
class Vector(Feature):
    """Numbers of shape ``(size,)``, or ``()`` of a single one.

    All vectors of a policy are concatenated and encoded together.
    """

    name: ClassVar[str] = "vector"
    encoder_name: ClassVar[str] = "state"

    def check_declaration(self, key: str) -> None:
        """Refuse what has more axes than one."""
        super().check_declaration(key)
        if len(self.shape) > 1:
            raise ConfigError(
                f"Observation '{key}' has shape {self.shape} and is declared nothing but a vector, which has "
                f"one axis; flatten it, or say what it is with data.kinds={{{key}: KIND}}."
            )

    def numbers(self, values: Tensor) -> Tensor:
        """Themselves."""
        return values if values.ndim == 3 else values[..., None]
