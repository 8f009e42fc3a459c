"""Observation encoders: one step of observations to tokens that the action tokens attend to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from flowpolicy.features import Feature, Image, Vector
from flowpolicy.features.cameras import CameraEncoders
from flowpolicy.features.keyed import KeyedModules
from flowpolicy.features.state_encoder import StateEncoder
from flowpolicy.models.config import EncoderConfig

_BUILT = ("state", "task", "cameras")
_TOKENS = ("cameras", "state", "task")
"""Orders in which weights are drawn and tokens stand, which saved policies rely on; other kinds come after,
in the order of declaration."""


class ObservationEncoder(KeyedModules[nn.Module]):
    """Several kinds of observation, each encoded by its own module, to the tokens of all of them.

    Images may come as they are, ``(B, T_o, H, W, C)``, or as the tokens that :meth:`encode_images` made of
    them: then the image encoder is not run again. The module ``cameras`` is there without cameras too.

    Args:
        features: by key.
        obs_horizon: T_o.
        config: sizes.
    """

    cameras: CameraEncoders
    _order: tuple[str, ...] = ()

    def __init__(self, features: Mapping[str, Feature], obs_horizon: int, config: EncoderConfig) -> None:
        groups: dict[str, dict[str, Feature]] = {}
        for key, feature in features.items():
            groups.setdefault(_group(feature), {})[key] = feature
        order = tuple(_ordered(groups, _TOKENS))
        groups.setdefault(Image.encoder_name, {})
        kinds = {_group(feature): type(feature) for feature in features.values()}
        super().__init__(
            {
                name: kinds.get(name, Image).encoder(groups[name], obs_horizon, config)
                for name in _ordered(groups, _BUILT)
            }
        )
        self._order = order

    def encode_images(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observation with each camera's images in place of them as tokens ``(B, num_tokens, d)``."""
        return self.cameras.encode_images(observation)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Tokens ``(B, S, d)``."""
        return torch.cat([self[name](observation) for name in self._order], dim=1)


def build_encoder(
    features: Mapping[str, Feature], obs_horizon: int, config: EncoderConfig
) -> StateEncoder | ObservationEncoder:
    """The encoder for these features: where there are vectors alone, theirs."""
    if all(isinstance(feature, Vector) for feature in features.values()):
        return StateEncoder(features, obs_horizon, config.width, config.tokens_per_step)
    return ObservationEncoder(features, obs_horizon, config)


def _group(feature: Feature) -> str:
    return feature.encoder_name or feature.name


def _ordered(names: Iterable[str], first: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: first.index(name) if name in first else len(first))
