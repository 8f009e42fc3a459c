"""Grids of flow times: where a chunk's integration steps begin and end. The only place that says k / K."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Protocol

from flowpolicy.plugins import register
from flowpolicy.ranges import between
from flowpolicy.settings import Settings, build, choose, require


class Grid(Protocol):
    """K steps from t = 0, the noise, to t = 1, the data."""

    name: ClassVar[str]

    def steps(self, num_steps: int) -> list[tuple[float, float]]:
        """Left end-point t_k and length h_k = t_{k+1} - t_k of each step; a ConfigError without K steps."""
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
        return _between([t / (t + self.shift * (1 - t)) for t in _uniform(num_steps)])


@register(GRIDS)
@dataclass(frozen=True)
class Sigmoid(Settings, prefix="grid"):
    """t' = 1/2 + tanh(a (t - 1/2)) / (2 tanh(a / 2)) of the uniform grid: short steps at both ends, as a
    sigmoid schedule has them (Zhuo et al. 2024, Lumina-Next).

    Attributes:
        steepness: a.
    """

    name: ClassVar[str] = "sigmoid"
    steepness: Annotated[float, between(0.01, 20)] = 1.5

    def steps(self, num_steps: int) -> list[tuple[float, float]]:
        """K steps of different lengths."""
        odd = [math.tanh(self.steepness * (t - 0.5)) for t in _uniform(num_steps)]
        return _between([(value / odd[-1] + 1) / 2 for value in odd])


@register(GRIDS)
@dataclass(frozen=True)
class Given(Settings, prefix="grid"):
    """Steps between given times.

    Attributes:
        times: t_0 = 0, ..., t_K = 1, ascending.
    """

    name: ClassVar[str] = "given"
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = list(itertools.pairwise(self.times))
        ascending = bool(pairs) and all(start < end for start, end in pairs)
        is_whole = ascending and (self.times[0], self.times[-1]) == (0, 1)
        require(is_whole, "grid.times", list(self.times), "ascending from 0 to 1")

    def steps(self, num_steps: int) -> list[tuple[float, float]]:
        """The K steps."""
        require(len(self.times) == num_steps + 1, "grid.times", list(self.times), f"of {num_steps} steps")
        return _between(self.times)


def _uniform(num_steps: int) -> list[float]:
    return [k / num_steps for k in range(num_steps + 1)]


def _between(times: Sequence[float]) -> list[tuple[float, float]]:
    return [(start, end - start) for start, end in itertools.pairwise(times)]


def build_grid(given: Mapping[str, Any] | None) -> Grid:
    """A grid from a mapping with ``name`` and that grid's settings; None is the uniform one."""
    if not given:
        return Uniform()
    values = dict(given)
    cls = choose(GRIDS, str(values.pop("name", Uniform.name)), "grid.name")
    return build(cls, values, "grid")


def described(grid: Grid) -> dict[str, Any]:
    """The mapping with every setting that :func:`build_grid` makes the grid from, as a JSON file has it."""
    settings = asdict(grid)  # type: ignore[call-overload]  # grids are dataclasses, as build() needs them
    return {"name": grid.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}
