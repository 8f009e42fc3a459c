"""Colour and grey images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.errors import ConfigError
from flowpolicy.features.cameras import CameraEncoders
from flowpolicy.features.feature import FEATURE_KINDS, Feature, TokenSizes
from flowpolicy.plugins import register
from flowpolicy.settings import require

CHANNELS = (1, 3, 4)
MOST_PIXELS = 2048
"""A side of an image."""


@register(FEATURE_KINDS)
@dataclass(frozen=True)
class Image(Feature):
    """Pixels ``(height, width, channels)``, uint8, 0 to 255; 1, 3 or 4 channels.

    Each camera has an encoder of its own, which crops at random in training; see ``model.vision``.
    """

    name: ClassVar[str] = "image"
    dtype: ClassVar[type[np.generic]] = np.uint8
    bounds: ClassVar[tuple[float, float]] = (0, 255)
    is_frame: ClassVar[bool] = True
    encoder_name: ClassVar[str] = "cameras"

    def check_declaration(self, key: str) -> None:
        """Refuse what is no image, and one whose channels come first."""
        if len(self.shape) == 3 and channels_first(self.shape):
            channels, height, width = self.shape
            raise ConfigError(
                f"Observation '{key}' is an image of shape {self.shape}, with its channels first; give it as "
                f"({height}, {width}, {channels}), or import the demonstrations again by flowpolicy "
                "import-demos, which turns images around."
            )
        if len(self.shape) != 3 or self.shape[2] not in CHANNELS:
            raise ConfigError(
                f"Observation '{key}' of shape {self.shape} is declared an image; give height, width and 1, "
                "3 or 4 channels."
            )
        check_sides(key, self.shape)

    def array(self, values: Any) -> NDArray[Any]:
        """As they are: another type is a mistake, which :meth:`problem` names."""
        return np.asarray(values)

    def tensor(self, values: Any, device: torch.device) -> Tensor:
        """As they are."""
        return torch.as_tensor(values, device=device)

    def problem(self, values: Tensor | NDArray[Any]) -> str:
        """Any other type than uint8."""
        if values.dtype in ((torch.uint8,) if isinstance(values, Tensor) else (np.uint8,)):
            return ""
        return f"is an image of {values.dtype}; give uint8, 0 to 255"

    def rearranged(self, values: NDArray[Any]) -> NDArray[Any] | None:
        """``(..., channels, height, width)`` with the channels last."""
        height, width, channels = self.shape
        is_first = values.shape[-3:] == (channels, height, width)
        return np.moveaxis(values, -3, -1) if is_first else None

    def normalized(self) -> NDArray[np.bool_]:
        """None: the encoder knows the range of a pixel."""
        return np.zeros(self.shape, bool)

    def random(self, leading: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Any pixels."""
        return torch.randint(256, (*leading, *self.shape), generator=generator, dtype=torch.uint8)

    def pixels(self, values: Tensor) -> Tensor:
        """The encoder's input, ``(B, T_o, H, W, channels)`` from 0 to 255."""
        return values

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the encoder's input."""
        height, width, channels = self.shape
        return height, width, channels

    @classmethod
    def encoder(cls, features: Mapping[str, Any], obs_horizon: int, sizes: TokenSizes) -> CameraEncoders:
        """One image encoder for each camera."""
        return CameraEncoders(features, obs_horizon, sizes.width, sizes.vision)


def channels_first(shape: Sequence[int]) -> bool:
    """Whether images of this shape are (channels, height, width); channels last where both would do."""
    return shape[0] in CHANNELS and shape[-1] not in CHANNELS


def check_sides(key: str, shape: tuple[int, ...]) -> None:
    """Refuse images that are larger than any that is taken."""
    allowed = f"an image of at most {MOST_PIXELS} pixels a side"
    require(max(shape) <= MOST_PIXELS, f"observations.{key[:80]}", shape, allowed)
