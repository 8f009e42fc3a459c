"""Observation encoders: one step of observations to tokens that the action tokens attend to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
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

    Raises:
        ConfigError: kinds of one encoder name are encoded differently.
    """

    cameras: CameraEncoders
    _order: tuple[str, ...] = ()

    def __init__(self, features: Mapping[str, Feature], obs_horizon: int, config: EncoderConfig) -> None:
        groups: dict[str, dict[str, Feature]] = {}
        for key, feature in features.items():
            groups.setdefault(_group(feature), {})[key] = feature
        order = tuple(_ordered(groups, _TOKENS))
        groups.setdefault(Image.encoder_name, {})
        super().__init__(
            {
                name: _kind(name, groups[name]).encoder(groups[name], obs_horizon, config)
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
    """The encoder for these features: where there are vectors alone, and encoded as vectors are, theirs."""
    if all(isinstance(each, Vector) and _encodes(each) == _encodes(Vector) for each in features.values()):
        return StateEncoder(features, obs_horizon, config.width, config.tokens_per_step)
    return ObservationEncoder(features, obs_horizon, config)


def _group(feature: Feature) -> str:
    return feature.encoder_name or feature.name


def _encodes(kind: Feature | type[Feature]) -> object:
    """What makes the encoder of a kind; inherited, it is that of the parent."""
    return getattr(kind.encoder, "__func__", kind.encoder)


def _kind(name: str, group: Mapping[str, Feature]) -> type[Feature]:
    """A kind whose encoder reads all of a group; of no features, that of images."""
    kinds = {_encodes(feature): type(feature) for feature in group.values()} or {None: Image}
    if len(kinds) > 1:
        raise ConfigError(
            f"Observations {', '.join(group)} share the encoder '{name}', and the kinds "
            f"{', '.join(kind.name for kind in kinds.values())} make different ones; give each kind an "
            "encoder_name of its own."
        )
    return next(iter(kinds.values()))


def _ordered(names: Iterable[str], first: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: first.index(name) if name in first else len(first))
