"""Distributions of the flow time t in training (0 = noise, 1 = data), all by inverse transform."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowpolicy.settings import build, choose, require


class TimeSampler(Protocol):
    """Draws flow times."""

    def __call__(self, count: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Times ``(count,)`` in [0, 1]."""
        ...


@dataclass(frozen=True)
class Uniform:
    """t ~ U(0, 1) (Lipman et al. 2023; Liu et al. 2023)."""

    def __call__(self, count: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Times ``(count,)``."""
        return torch.rand(count, generator=generator, device=device)


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(z), z ~ N(mean, std^2) (Esser et al. 2024, section 3.1): mass in the middle."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.std <= 100, "time_sampling.std", self.std, "positive and at most 100")
        require(abs(self.mean) <= 100, "time_sampling.mean", self.mean, "between -100 and 100")

    def __call__(self, count: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Times ``(count,)``."""
        return torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator, device=device))


@dataclass(frozen=True)
class Beta:
    """t = limit (1 - u), u ~ Beta(alpha, 1) (Black et al. 2024, pi0, appendix B): mass near the noise."""

    alpha: float = 1.5
    limit: float = 0.999

    def __post_init__(self) -> None:
        require(0.01 <= self.alpha <= 100, "time_sampling.alpha", self.alpha, "between 0.01 and 100")
        require(0 < self.limit <= 1, "time_sampling.limit", self.limit, "in (0, 1]")

    def __call__(self, count: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Times ``(count,)``."""
        u = torch.rand(count, generator=generator, device=device) ** (1.0 / self.alpha)
        return self.limit * (1.0 - u)


@dataclass(frozen=True)
class UShaped:
    """p(t) proportional to cosh(a (t - 1/2)) (Lee et al. 2024, made symmetric): mass at both ends.

    Proposed for reflow pairs; never a default here.
    """

    a: float = 4.0

    def __post_init__(self) -> None:
        require(0 < self.a <= 100, "time_sampling.a", self.a, "positive and at most 100")

    def __call__(self, count: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Times ``(count,)``."""
        u = torch.rand(count, generator=generator, device=device)
        rising = torch.log1p(u * math.expm1(self.a)) / self.a
        mirrored = torch.rand(count, generator=generator, device=device) < 0.5
        return torch.where(mirrored, 1.0 - rising, rising)


TIME_SAMPLERS: dict[str, type[TimeSampler]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "beta": Beta,
    "u_shaped": UShaped,
}


def build_time_sampler(settings: str | Mapping[str, object]) -> TimeSampler:
    """From a name, or a mapping with ``name`` and that sampler's parameters."""
    values = {"name": settings} if isinstance(settings, str) else dict(settings)
    cls = choose(TIME_SAMPLERS, str(values.pop("name", "")), "policy.time_sampling.name")
    return build(cls, values, "policy.time_sampling")
