"""The inputs of networks beside the flow, as a critic, from an observation."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
from flowpolicy.features import Feature, Image
from flowpolicy.features.cameras import CameraEncoders
from flowpolicy.features.keyed import KeyedModules
from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.flow.network import Network
from flowpolicy.models.encoders import ObservationEncoder

TOKEN_FEATURES = 8


class ObservationFeatures(nn.Module):
    """One vector for each row: vectors as they are, and a few learned numbers of each token of an image.

    The tokens are those of the flow's own encoder, which gets no gradient from here; or, with ``own``, of
    a copy of it that learns with the network that these features are for.

    Args:
        network: the flow's network.
        features: key -> feature.
        obs_horizon: T_o.
        own: copy the image encoders.
    """

    def __init__(
        self,
        network: Network,
        features: Mapping[str, Feature],
        obs_horizon: int,
        own: bool = False,
    ) -> None:
        super().__init__()
        self.vectors = {key: item for key, item in features.items() if not isinstance(item, Image)}
        self.size = obs_horizon * sum(feature.size for feature in self.vectors.values())
        none = CameraEncoders({}, obs_horizon, 1, VisionConfig())
        encoder = getattr(network, "encoder", None)
        cameras = encoder.cameras if isinstance(encoder, ObservationEncoder) else none
        images = [key for key in features if key not in self.vectors and key not in cameras]
        if images:
            raise ConfigError(
                f"The network encodes '{images[0]}' by itself, so nothing else can read it; fine-tune a "
                "network that has an ObservationEncoder as its encoder."
            )
        self.size += TOKEN_FEATURES * sum(camera.num_tokens for _, camera in cameras.items())
        self.narrow = KeyedModules(
            {key: nn.Linear(camera.position.shape[-1], TOKEN_FEATURES) for key, camera in cameras.items()}
        )
        self.cameras = copy.deepcopy(cameras).requires_grad_(True) if own else none

    @property
    def has_encoders(self) -> bool:
        """Whether images are wanted as they are, and not as the flow's tokens."""
        return len(self.cameras) > 0

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """``(B, size)`` of normalised observations, key -> ``(B, T_o, *shape)``.

        Images come as the flow's tokens (:func:`~flowpolicy.flow.network.encode_images`), unless the encoders
        are own.
        """
        parts = [feature.numbers(observation[key]).flatten(1) for key, feature in self.vectors.items()]
        encoded = self.cameras.encode_images(observation)
        for key, narrow in self.narrow.items():
            tokens = encoded[key] if self.has_encoders else encoded[key].detach()
            parts.append(narrow(tokens).flatten(1))
        return torch.cat(parts, dim=-1)
