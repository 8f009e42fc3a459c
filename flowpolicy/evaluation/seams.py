"""Smoothness of executed actions between chunks, compared with that inside chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """Mean, 95th percentile and number of some values; NaN where there are none."""

    mean: float
    p95: float
    count: int

    @classmethod
    def of(cls, values: Numbers) -> Spread:
        """That of ``values`` ``(n,)``."""
        if not len(values):
            return cls(float("nan"), float("nan"), 0)
        return cls(float(values.mean()), float(np.quantile(values, 0.95)), len(values))


@dataclass(frozen=True)
class Smoothness:
    """Changes of the executed actions, root mean square over their dimensions, in action ranges.

    Attributes:
        seam_jump: change from the tick before to the first tick of a new chunk.
        inside_jump: change from tick to tick within a chunk.
        seam_jerk: third differences over dt^3 whose four ticks contain such a first tick, 1/s^3.
        inside_jerk: those within a chunk.
    """

    seam_jump: Spread
    inside_jump: Spread
    seam_jerk: Spread
    inside_jerk: Spread


def smoothness(
    episodes: Iterable[tuple[NDArray[Any], NDArray[Any]]], width: NDArray[Any], period: float
) -> Smoothness:
    """The smoothness of whole episodes.

    An episode's first chunk follows no other and has no seam; safe actions belong to no chunk.

    Args:
        episodes: of each the executed actions ``(n, A)`` and the number of the chunk that each is from,
            ``(n,)``, counted from 0; -1 for a safe action.
        width: ``(A,)`` action range; 1 where it is infinite.
        period: dt, s.
    """
    found: dict[str, list[Numbers]] = {"sj": [], "ij": [], "sk": [], "ik": []}
    for actions, chunk in episodes:
        scaled = np.asarray(actions, dtype=np.float64) / width
        jump, jerk = _size(np.diff(scaled, axis=0)), _size(np.diff(scaled, n=3, axis=0)) / period**3
        seam = (chunk[1:] > 0) & (chunk[1:] != chunk[:-1])
        inside = (chunk[1:] >= 0) & (chunk[1:] == chunk[:-1])
        found["sj"].append(jump[seam])
        found["ij"].append(jump[inside])
        if len(jerk):
            found["sk"].append(jerk[seam[:-2] | seam[1:-1] | seam[2:]])
            found["ik"].append(jerk[inside[:-2] & inside[1:-1] & inside[2:]])
    return Smoothness(*(Spread.of(np.concatenate(parts or [np.zeros(0)])) for parts in found.values()))


def _size(rows: Numbers) -> Numbers:
    sizes: Numbers = np.sqrt((rows**2).mean(axis=-1))
    return sizes
