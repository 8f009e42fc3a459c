"""Distributions of the flow time t in training (0 = noise, 1 = data), all by inverse transform."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor

from flowpolicy.ranges import between, positive_to, within
from flowpolicy.settings import Settings, build, choose


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
class LogitNormal(Settings, prefix="time_sampling"):
    """t = sigmoid(z), z ~ N(mean, std^2) (Esser et al. 2024, section 3.1): mass in the middle."""

    mean: Annotated[float, between(-100, 100)] = 0.0
    std: Annotated[float, positive_to(100)] = 1.0

    def __call__(self, count: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Times ``(count,)``."""
        return torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator, device=device))


@dataclass(frozen=True)
class Beta(Settings, prefix="time_sampling"):
    """t = limit (1 - u), u ~ Beta(alpha, 1) (Black et al. 2024, pi0, appendix B): mass near the noise."""

    alpha: Annotated[float, between(0.01, 100)] = 1.5
    limit: Annotated[float, within("(0, 1]")] = 0.999

    def __call__(self, count: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Times ``(count,)``."""
        u = torch.rand(count, generator=generator, device=device) ** (1.0 / self.alpha)
        return self.limit * (1.0 - u)


@dataclass(frozen=True)
class UShaped(Settings, prefix="time_sampling"):
    """p(t) proportional to cosh(a (t - 1/2)) (Lee et al. 2024, made symmetric): mass at both ends.

    Proposed for reflow pairs; never a default here.
    """

    a: Annotated[float, positive_to(100)] = 4.0

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
