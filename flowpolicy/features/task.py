"""Which of several tasks is to be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
from flowpolicy.features.feature import FEATURE_KINDS, Feature, TokenSizes
from flowpolicy.plugins import register


class TaskEncoder(nn.Module):
    """Which task is to be done, from the newest step, to one token.

    Args:
        features: by key; one-hot vectors.
        width: channels of a token, d.
    """

    def __init__(self, features: Mapping[str, Feature], width: int) -> None:
        super().__init__()
        self.keys = tuple(features)
        self.embed = nn.Linear(sum(feature.size for feature in features.values()), width)
        self.norm = nn.LayerNorm(width)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """A token ``(B, 1, d)``."""
        task = torch.cat([observation[key][:, -1:] for key in self.keys], dim=-1)
        result: Tensor = self.norm(self.embed(task))
        return result


@register(FEATURE_KINDS)
@dataclass(frozen=True)
class Task(Feature):
    """A one-hot vector ``(number of tasks,)``; it has a token of its own."""

    name: ClassVar[str] = "task"

    def check_declaration(self, key: str) -> None:
        """Refuse what is no vector."""
        super().check_declaration(key)
        if len(self.shape) != 1:
            raise ConfigError(
                f"Observation '{key}' has shape {self.shape}; it is the one-hot vector of the task to do: "
                "give one entry for each task, or name something else otherwise."
            )

    @classmethod
    def encoder(cls, features: Mapping[str, Feature], obs_horizon: int, sizes: TokenSizes) -> TaskEncoder:
        """One token of the newest step."""
        return TaskEncoder(features, sizes.width)
