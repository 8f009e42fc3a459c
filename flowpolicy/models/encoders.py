"""Observation encoders: one step of observations to tokens that the action tokens attend to."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
from flowpolicy.models.config import EncoderConfig
from flowpolicy.models.keyed import KeyedModules
from flowpolicy.models.vision.encoder import ImageEncoder
from flowpolicy.observations import TASK, is_image


class StateEncoder(nn.Module):
    """Low-dimensional keys, concatenated, to ``tokens_per_step`` tokens for each of the T_o steps.

    Args:
        shapes: key -> ``(size,)``, or ``()`` of a single number; the order of the keys is the order of
            concatenation.
        obs_horizon: T_o.
        config: gives width and tokens per step.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], obs_horizon: int, config: EncoderConfig
    ) -> None:
        super().__init__()
        for key, shape in shapes.items():
            if len(shape) > 1:
                raise ConfigError(
                    f"Observation '{key}' has shape {shape}; a policy sees numbers, vectors, and images of "
                    "height, width and 1, 3 or 4 channels."
                )
        self.keys = tuple(shapes)
        self.tokens_per_step = config.tokens_per_step
        size, width = sum(math.prod(shape) for shape in shapes.values()), config.width
        self.mlp = nn.Sequential(
            nn.Linear(size, 2 * width), nn.SiLU(), nn.Linear(2 * width, config.tokens_per_step * width)
        )
        self.position = nn.Parameter(torch.randn(obs_horizon * config.tokens_per_step, width).mul_(0.02))
        self.norm = nn.LayerNorm(width)

    def encode_images(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observation as it is: there are no images."""
        return dict(observation)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Tokens ``(B, T_o * tokens_per_step, d)``."""
        parts = [observation[key] for key in self.keys]
        state = torch.cat([part if part.ndim == 3 else part[..., None] for part in parts], dim=-1)
        tokens = self.mlp(state).view(len(state), -1, self.position.shape[-1])
        result: Tensor = self.norm(tokens) + self.position
        return result


class TaskEncoder(nn.Module):
    """Which task is to be done, from the newest step, to one token.

    Args:
        num_tasks: length of the one-hot vector.
        width: channels of a token, d.
    """

    def __init__(self, num_tasks: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(num_tasks, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, task: Tensor) -> Tensor:
        """A token ``(B, 1, d)`` from ``(B, T_o, num_tasks)``."""
        result: Tensor = self.norm(self.embed(task[:, -1:]))
        return result


class ObservationEncoder(nn.Module):
    """Several kinds of observation, each encoded by its own module, to the tokens of all of them.

    Images may come as they are, ``(B, T_o, H, W, C)``, or as the tokens that :meth:`encode_images` made of
    them: then the image encoder is not run again.

    Args:
        shapes: key -> shape of one step.
        obs_horizon: T_o.
        config: sizes.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], obs_horizon: int, config: EncoderConfig
    ) -> None:
        super().__init__()
        if TASK in shapes and len(shapes[TASK]) != 1:
            raise ConfigError(
                f"Observation '{TASK}' has shape {shapes[TASK]}; it is the one-hot vector of the task to do: "
                "give one entry for each task, or name something else otherwise."
            )
        images = {key: shape for key, shape in shapes.items() if is_image(shape)}
        vectors = {key: shape for key, shape in shapes.items() if key not in images and key != TASK}
        self.state = StateEncoder(vectors, obs_horizon, config) if vectors else None
        self.task = TaskEncoder(shapes[TASK][0], config.width) if TASK in shapes else None
        self.cameras = KeyedModules(
            {
                key: ImageEncoder(shape, obs_horizon, config.width, config.vision)
                for key, shape in images.items()
            }
        )

    def encode_images(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The observation with each camera's images in place of them as tokens ``(B, num_tokens, d)``."""
        encoded = dict(observation)
        for key, camera in self.cameras.items():
            if encoded[key].ndim == 5:
                encoded[key] = camera(encoded[key])
        return encoded

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Tokens ``(B, S, d)``."""
        encoded = self.encode_images(observation)
        parts = [encoded[key] for key in self.cameras]
        if self.state is not None:
            parts.append(self.state(encoded))
        if self.task is not None:
            parts.append(self.task(encoded[TASK]))
        return torch.cat(parts, dim=1)


def build_encoder(
    shapes: Mapping[str, tuple[int, ...]], obs_horizon: int, config: EncoderConfig
) -> StateEncoder | ObservationEncoder:
    """The encoder for observations of these shapes."""
    if TASK in shapes or any(is_image(shape) for shape in shapes.values()):
        return ObservationEncoder(shapes, obs_horizon, config)
    return StateEncoder(shapes, obs_horizon, config)
