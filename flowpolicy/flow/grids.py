"""Grids of flow times: where a chunk's integration steps begin and end. The only place that says k / K."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

from flowpolicy.plugins import register
from flowpolicy.ranges import between
from flowpolicy.settings import Settings, build, choose


class Grid(Protocol):
    """K steps from t = 0, the noise, to t = 1, the data."""

    name: ClassVar[str]

    def steps(self, num_steps: int) -> list[tuple[float, float]]:
        """Left end-point t_k and length h_k = t_{k+1} - t_k of each step."""
        ...


GRIDS: dict[str, type[Grid]] = {}


@register(GRIDS)
@dataclass(frozen=True)
class Uniform:
    """t_k = k / K."""

    name: ClassVar[str] = "uniform"

    def steps(self, num_steps: int) -> list[tuple[float, float]]:
        """K steps of 1 / K."""
        return [(k / num_steps, 1.0 / num_steps) for k in range(num_steps)]


@register(GRIDS)
@dataclass(frozen=True)
class Shifted(Settings, prefix="grid"):
    """t' = t / (t + s (1 - t)) of the uniform grid (Esser et al. 2024, "Scaling Rectified Flow Transformers",
    equation 23): s < 1 takes long steps at the noise and short ones at the data.

    Attributes:
        shift: s.
    """

    name: ClassVar[str] = "shifted"
    shift: Annotated[float, between(0.01, 100)] = 0.5

    def steps(self, num_steps: int) -> list[tuple[float, float]]:
        """K steps of different lengths."""
        uniform = [k / num_steps for k in range(num_steps + 1)]
        times = [t / (t + self.shift * (1 - t)) for t in uniform]
        return [(start, end - start) for start, end in itertools.pairwise(times)]


def build_grid(given: Mapping[str, Any] | None) -> Grid:
    """A grid from a mapping with ``name`` and that grid's settings; None is the uniform one."""
    if not given:
        return Uniform()
    values = dict(given)
    cls = choose(GRIDS, str(values.pop("name", Uniform.name)), "grid.name")
    return build(cls, values, "grid")
