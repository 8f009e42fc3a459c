"""Whether an observation is there: not every recording, and not every robot, has all that a policy reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowpolicy.errors import ConfigError
from flowpolicy.features.feature import FEATURE_KINDS, Feature
from flowpolicy.features.vector import Vector
from flowpolicy.plugins import register


@register(FEATURE_KINDS)
@dataclass(frozen=True)
class Presence(Vector):
    """1 where another observation is there and 0 where it is not; the other one is then at rest, zeros or a
    black image.

    A policy with one takes observations without the other: see :func:`completed`.

    Attributes:
        of: the key of the other observation.
    """

    of: str = ""

    name: ClassVar[str] = "presence"
    bounds: ClassVar[tuple[float, float]] = (0, 1)

    def check_declaration(self, key: str) -> None:
        """Refuse more than one number."""
        super().check_declaration(key)
        if self.shape != () or not self.of:
            raise ConfigError(
                f"Observation '{key}' of shape {self.shape} is declared a presence of '{self.of}'; give one "
                "number a step, and the key that it speaks of."
            )

    def normalized(self) -> NDArray[np.bool_]:
        """0 and 1 stay."""
        return np.zeros(self.shape, bool)

    def resting(self) -> NDArray[Any]:
        """There."""
        return np.ones(self.shape, self.dtype)

    def random(self, leading: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """There or not."""
        return torch.randint(2, leading, generator=generator).float()


def presence_key(key: str) -> str:
    """What the presence of ``key`` is called."""
    return f"{key}.present"


def optional_keys(features: Mapping[str, Feature]) -> dict[str, str]:
    """Keys that an observation may lack, each with the key of its presence."""
    return {feature.of: key for key, feature in features.items() if isinstance(feature, Presence)}


def offered(features: Mapping[str, Feature], keys: Any) -> dict[str, Feature]:
    """The features that something with these ``keys`` must fit: not those that it may lack."""
    flags = optional_keys(features)
    return {
        key: feature
        for key, feature in features.items()
        if key in keys or not (key in flags or isinstance(feature, Presence))
    }


def completed(features: Mapping[str, Feature], observation: Mapping[str, Any]) -> Mapping[str, Any]:
    """An observation with what it may lack at rest, and with the presences: key -> ``(..., *shape)``.

    Those that it holds already are left as they are.
    """
    flags = optional_keys(features)
    if all(key in observation and flag in observation for key, flag in flags.items()):
        return observation
    given = ((np.shape(observation[key]), features[key].shape) for key in features if key in observation)
    leading = max((shape[: max(0, len(shape) - len(own))] for shape, own in given), key=len, default=())
    result = dict(observation)
    for key, flag in flags.items():
        if flag not in observation:
            result[flag] = np.full(leading, key in observation, np.float32)
        if key not in observation:
            rest = features[key].resting()
            result[key] = np.broadcast_to(rest, (*leading, *rest.shape)).copy()
    return result
