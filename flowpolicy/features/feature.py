"""A feature: one observation key, its kind and shape, and all that depends on the kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
from flowpolicy.features.state_encoder import StateEncoder
from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.settings import build, choose, require

MOST_NUMBERS = 100_000
"""Numbers of an observation that is no image."""


class TokenSizes(Protocol):
    """What the encoders take from a network's settings."""

    @property
    def width(self) -> int:
        """Channels of a token, d."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens made from the numbers of one observation step."""

    @property
    def vision(self) -> VisionConfig:
        """How images become tokens."""


@dataclass(frozen=True)
class Feature:
    """One observation key. Each kind is a subclass; this one treats values as plain numbers.

    Values are ``(..., *shape)``, in physical units unless said otherwise. Settings of a kind (the range of a
    depth camera) are further fields of its dataclass.

    Attributes:
        shape: of one step.
    """

    shape: tuple[int, ...]

    name: ClassVar[str] = ""
    """Of the kind."""
    dtype: ClassVar[type[np.generic]] = np.float32
    """Of the values that a policy takes."""
    bounds: ClassVar[tuple[float, float]] = (-np.inf, np.inf)
    """Of the values."""
    is_frame: ClassVar[bool] = False
    """Pixels of uint8: they may stay on disk, and a store keeps them in an image codec."""
    remedy: ClassVar[str] = "map its observation"
    """What to do where an environment or a robot has no such observation."""
    encoder_name: ClassVar[str] = ""
    """Of the encoder in a network's state; the kind's name where empty. Kinds with one name share it."""

    @classmethod
    def from_settings(cls, values: Mapping[str, Any], where: str) -> Feature:
        """The feature that ``{"kind": name, "shape": [...], ...}`` describes.

        Raises:
            ConfigError: an unknown kind, or settings that it does not have.
        """
        values = dict(values)
        kind = values.pop("kind", None)
        if kind is None:
            raise ConfigError(f"{where}.kind is missing; choose one of {', '.join(sorted(FEATURE_KINDS))}.")
        return build(choose(FEATURE_KINDS, str(kind), f"{where}.kind"), values, where)

    def content(self) -> dict[str, Any]:
        """What :meth:`from_settings` reads, as JSON has it."""
        return {"kind": self.name, **dataclasses.asdict(self), "shape": list(self.shape)}

    def declaration(self) -> str | dict[str, Any]:
        """The kind alone, as a store's attributes have it: its name, or a mapping with its settings."""
        settings = {name: value for name, value in self.content().items() if name != "shape"}
        return settings if len(settings) > 1 else self.name

    def check_declaration(self, key: str) -> None:
        """Refuse a shape, or settings, that this kind cannot have.

        Raises:
            ConfigError: one sentence that names the key and the fix.
        """
        allowed = f"a {self.name} of at most {MOST_NUMBERS:,} numbers"
        require(math.prod(self.shape) <= MOST_NUMBERS, f"observations.{key[:80]}", self.shape, allowed)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether values of this shape are one step's."""
        return shape == self.shape

    def parsed(self, values: Any) -> Any:
        """Values as numbers, where a kind is given in another form; as they are where it is not."""
        return values

    def array(self, values: Any) -> NDArray[Any]:
        """Values as a store, a robot or a client gives them, of :attr:`dtype`."""
        array: NDArray[Any] = np.asarray(values)
        if array.dtype != self.dtype:
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinity, and refused as such
                array = array.astype(self.dtype)
        return array

    def tensor(self, values: Any, device: torch.device) -> Tensor:
        """The same as a tensor on ``device``."""
        return torch.as_tensor(values, dtype=torch.float32, device=device)

    def over_history(self, values: Tensor, rows: int, obs_horizon: int) -> Tensor:
        """Values for a batch of histories, where a kind may be given once for all of it; as they are where it
        may not."""
        return values

    def problem(self, values: Tensor | NDArray[Any]) -> str:
        """Why values of :attr:`dtype` are refused, in words that follow their name; empty if they are not."""
        if isinstance(values, np.ndarray):  # counted, which is the quickest way for a few numbers
            finite = np.count_nonzero(np.isfinite(values)) == values.size
        else:
            finite = bool(torch.isfinite(values).all())
        return "" if finite else "holds NaN or infinity; no action is computed from it"

    def refusal(self, error: Exception) -> str:
        """The same of values that :meth:`array` or :meth:`tensor` raised ``error`` at."""
        return "is not an array of numbers; give one"

    def type_problem(self, dtype: Any) -> str:
        """The same of values of an element type, whatever they are."""
        read = self.array(np.empty((0, *self.shape), dtype))
        return self.problem(read) if read.dtype != self.dtype else ""

    def rearranged(self, values: NDArray[Any]) -> NDArray[Any] | None:
        """Values of another known layout as ``(..., *shape)``; None where they have none."""
        return None

    def normalized(self) -> NDArray[np.bool_]:
        """Which entries, of ``shape``, are mapped to about [-1, 1] by the demonstrations' statistics."""
        return np.ones(self.shape, bool)

    def resting(self) -> NDArray[Any]:
        """A value ``shape`` to warm up with."""
        return np.zeros(self.shape, self.dtype)

    def random(self, leading: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Values ``(*leading, *shape)`` over the range of the kind, normalised where it is."""
        return torch.rand((*leading, *self.shape), generator=generator) * 2 - 1

    @property
    def size(self) -> int:
        """How many numbers a network reads of one step; see :meth:`numbers`."""
        return math.prod(self.shape)

    def numbers(self, values: Tensor) -> Tensor:
        """Normalised ``(B, T_o, *shape)`` to what a network reads of it, ``(B, T_o, size)``."""
        return values.flatten(2) if values.ndim > 2 else values[..., None]

    @classmethod
    def encoder(cls, features: Mapping[str, Any], obs_horizon: int, sizes: TokenSizes) -> nn.Module:
        """A module from normalised observations to the tokens ``(B, S, d)`` of all keys of this kind.

        Args:
            features: key -> feature, in the order of declaration.
            obs_horizon: T_o.
            sizes: of the tokens.
        """
        return StateEncoder(features, obs_horizon, sizes.width, sizes.tokens_per_step)


FEATURE_KINDS: dict[str, type[Feature]] = {}


def declared(kind: str | Mapping[str, Any], shape: tuple[int, ...], where: str) -> Feature:
    """A feature of this shape from the name of its kind, or from ``{"kind": name, ...}`` with settings of it.

    Raises:
        ConfigError: an unknown kind, or settings that it does not have.
    """
    settings = dict(kind) if isinstance(kind, Mapping) else {"kind": kind}
    return Feature.from_settings({**settings, "shape": shape}, where)
