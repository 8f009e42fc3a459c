"""What the networks beside the flow, its noise and the critic, take from an observation."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
from flowpolicy.flow.network import Network
from flowpolicy.models.encoders import ObservationEncoder
from flowpolicy.models.keyed import KeyedModules
from flowpolicy.models.vision.encoder import ImageEncoder
from flowpolicy.observations import is_image

TOKEN_FEATURES = 8


class ObservationFeatures(nn.Module):
    """One vector for each row: vectors as they are, and a few learned numbers of each token of an image.

    The tokens are those of the flow's own encoder, which gets no gradient from here; or, with ``own``, of
    a copy of it that learns with the network that these features are for.

    Args:
        network: the flow's network.
        shapes: key -> shape of one observation step.
        obs_horizon: T_o.
        own: copy the image encoders.
    """

    def __init__(
        self,
        network: Network,
        shapes: Mapping[str, tuple[int, ...]],
        obs_horizon: int,
        own: bool = False,
    ) -> None:
        super().__init__()
        self.vectors = tuple(key for key, shape in shapes.items() if not is_image(shape))
        self.size = obs_horizon * sum(math.prod(shapes[key]) for key in self.vectors)
        none = KeyedModules[ImageEncoder]({})
        encoder = getattr(network, "encoder", None)
        cameras = encoder.cameras if isinstance(encoder, ObservationEncoder) else none
        images = [key for key, shape in shapes.items() if is_image(shape) and key not in cameras]
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
        parts = [observation[key].flatten(1) for key in self.vectors]
        for key, narrow in self.narrow.items():
            own = self.cameras[key](observation[key]) if self.has_encoders else observation[key].detach()
            parts.append(narrow(own).flatten(1))
        return torch.cat(parts, dim=-1)
