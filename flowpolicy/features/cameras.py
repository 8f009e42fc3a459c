"""Several cameras to tokens, each by an image encoder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from flowpolicy.features.keyed import KeyedModules
from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.features.vision.encoder import ImageEncoder


class Camera(Protocol):
    """A feature that is read as images."""

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""

    @property
    def is_frame(self) -> bool:
        """Whether these are colours."""

    def pixels(self, values: Tensor) -> Tensor:
        """Images ``(B, T_o, H, W, channels)`` from 0 to 255, of values ``(B, T_o, *shape)``."""


class CameraEncoders(KeyedModules[ImageEncoder]):
    """Images may come as they are, or as the tokens that :meth:`encode_images` made of them: then the image
    encoders are not run again.

    Args:
        features: the camera of each key.
        obs_horizon: T_o.
        width: channels of a token, d.
        config: of the encoders.
    """

    _features: Mapping[str, Camera] = {}  # of the class too, so that no key of this name takes its place

    def __init__(
        self, features: Mapping[str, Camera], obs_horizon: int, width: int, config: VisionConfig
    ) -> None:
        colourless = replace(config, jitter=None)
        super().__init__(
            {
                key: ImageEncoder(
                    feature.pixel_shape, obs_horizon, width, config if feature.is_frame else colourless
                )
                for key, feature in features.items()
            }
        )
        self._features = dict(features)

    def encode_images(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observation with each camera's images in place of them as tokens ``(B, num_tokens, d)``."""
        encoded = dict(observation)
        for key, feature in self._features.items():
            if encoded[key].ndim > 3:
                encoded[key] = self[key](feature.pixels(encoded[key]))
        return encoded

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Tokens ``(B, S, d)`` of all cameras."""
        encoded = self.encode_images(observation)
        return torch.cat([encoded[key] for key in self._features], dim=1)
