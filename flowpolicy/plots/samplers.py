"""The choice of a sampler: latency against action error, with both bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from flowpolicy.acceleration.choosing.config import PlanConfig
from flowpolicy.acceleration.choosing.measuring import Measured
from flowpolicy.plots.figure import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    house_figure,
    plain_log_ticks,
)

LEAST_DRAWN = 1e-4
_COLORS = {"onnx": BLUE, "eager": GREEN, "compile": PINK, "cuda_graph": AMBER}


def plot_planning(measured: Sequence[Measured], chosen: Measured, config: PlanConfig, path: Path) -> Path:
    """Every candidate that was timed, by backend; circles recompute everything, squares use a cache.

    Pale ones are too slow, or were left out after a few calls.
    """
    with house_figure(path, columns=1, width=6.4, height=4.0) as (_, (axis,)):
        timed = [item for item in measured if math.isfinite(item.bound)]
        for item in timed:
            color, at = _COLORS.get(item.backend, GREY), (item.bound, _drawn(item))
            pale = 1.0 if item.verdict == "in time" else 0.3
            axis.plot(*at, "s" if item.candidate.schedule else "o", ms=5, color=color, alpha=pale)
            axis.annotate(
                str(item.candidate.sampling.num_steps),
                at,
                (4, 3),
                textcoords="offset points",
                fontsize=6,
                color=GREY,
            )
        for backend in dict.fromkeys(item.backend for item in timed):
            axis.plot([], [], "o", ms=5, color=_COLORS.get(backend, GREY), label=backend)
        axis.plot(chosen.bound, _drawn(chosen), "o", ms=12, mfc="none", color=ORANGE, label="chosen")
        axis.axvline(config.period_ms, color=ORANGE, lw=0.8, ls=":", label="what was asked for")
        axis.axhline(config.max_action_error, color=ORANGE, lw=0.8, ls=":")
        axis.set(xscale="log", yscale="log", ylabel=f"action error, rms ({LEAST_DRAWN:g}: that or less)")
        axis.set_xlabel(f"ms within which {100 * config.quantile:g}% of the calls end; numbers are K")
        plain_log_ticks(axis)
        axis.legend(fontsize=8)
    return path


def _drawn(item: Measured) -> float:
    """The error as a logarithmic axis can show it."""
    return max(item.candidate.error, LEAST_DRAWN)
