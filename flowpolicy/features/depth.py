"""Depth maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.errors import ConfigError
from flowpolicy.features.feature import FEATURE_KINDS, Feature
from flowpolicy.features.image import Image, check_sides
from flowpolicy.plugins import register
from flowpolicy.settings import require

_MILLIMETRES = 1e-3


@register(FEATURE_KINDS)
@dataclass(frozen=True)
class Depth(Image):
    """Distances ``(height, width)`` or ``(height, width, 1)``: floats are metres, integers millimetres.

    They are held within a range and encoded as an image of one channel.

    Attributes:
        nearest: metres; smaller values, such as a sensor's 0 for no reading, are set to it.
        farthest: metres.
    """

    nearest: float = 0.0
    farthest: float = 10.0

    name: ClassVar[str] = "depth"
    dtype: ClassVar[type[np.generic]] = np.float32
    bounds: ClassVar[tuple[float, float]] = (-np.inf, np.inf)
    is_frame: ClassVar[bool] = False

    def check_declaration(self, key: str) -> None:
        """Refuse what is no map, or an empty range."""
        if len(self.shape) not in (2, 3) or self.shape[2:] not in ((), (1,)):
            raise ConfigError(
                f"Observation '{key}' of shape {self.shape} is declared a depth map; give (height, width) or "
                "(height, width, 1)."
            )
        check_sides(key, self.shape)
        allowed = f"above nearest = {self.nearest}, which is at least 0"
        ok = 0 <= self.nearest < self.farthest
        require(ok, f"observations.{key[:80]}.farthest", self.farthest, allowed)

    def array(self, values: Any) -> NDArray[Any]:
        """Metres."""
        values = np.asarray(values)
        metres = values * np.float32(_MILLIMETRES) if values.dtype.kind in "iu" else values
        return Feature.array(self, metres)

    def tensor(self, values: Any, device: torch.device) -> Tensor:
        """Metres."""
        given = torch.as_tensor(values, device=device)
        metres = given.to(torch.float32)
        return metres if given.is_floating_point() else metres * _MILLIMETRES

    def problem(self, values: Tensor | NDArray[Any]) -> str:
        """Not finite, or negative."""
        negative = "holds negative distances; a depth map has metres, or whole millimetres"
        return Feature.problem(self, values) or (negative if bool((values < 0).any()) else "")

    def random(self, leading: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Anything within the range."""
        share = torch.rand((*leading, *self.shape), generator=generator)
        return self.nearest + share * (self.farthest - self.nearest)

    def pixels(self, values: Tensor) -> Tensor:
        """0 at the nearest distance, 255 at the farthest."""
        share = (values.clamp(self.nearest, self.farthest) - self.nearest) / (self.farthest - self.nearest)
        return 255 * (share[..., None] if len(self.shape) == 2 else share)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Height, width, 1."""
        return self.shape[0], self.shape[1], 1
