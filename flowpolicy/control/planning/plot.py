"""The picture of a planning: latency against action error, with both bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from flowpolicy.control.planning.config import PlanConfig
from flowpolicy.control.planning.measuring import Measured
from flowpolicy.evaluation.plots import BLUE, GREEN, GREY, ORANGE, house_figure

_COLORS = {"onnx": BLUE, "eager": GREEN, "compile": "#CC79A7", "cuda_graph": "#E69F00"}


def plot_planning(measured: Sequence[Measured], chosen: Measured, config: PlanConfig, path: Path) -> Path:
    """Every candidate that was timed, by backend; circles recompute everything, squares use a cache."""
    with house_figure(path, columns=1, width=6.4, height=4.0) as (_, axes):
        axis = axes[0]
        seen: set[str] = set()
        for item in measured:
            if not math.isfinite(item.bound):
                continue
            first = item.backend not in seen
            seen.add(item.backend)
            axis.plot(
                item.bound, max(item.candidate.error, 1e-4), "s" if item.candidate.schedule else "o", ms=5,
                color=_COLORS.get(item.backend, GREY), label=item.backend if first else None,
            )  # fmt: skip
            axis.annotate(
                str(item.candidate.num_steps), (item.bound, max(item.candidate.error, 1e-4)), (4, 3),
                textcoords="offset points", fontsize=6, color=GREY,
            )  # fmt: skip
        axis.plot(
            chosen.bound,
            max(chosen.candidate.error, 1e-4),
            "o",
            ms=12,
            mfc="none",
            color=ORANGE,
            label="chosen",
        )
        axis.axvline(config.period_ms, color=ORANGE, lw=0.8, ls=":")
        axis.axhline(config.max_action_error, color=ORANGE, lw=0.8, ls=":")
        axis.set(xscale="log", yscale="log", ylabel="action error, rms of normalised actions")
        axis.set_xlabel(f"ms within which {100 * config.quantile:g}% of the calls end; numbers are K")
        axis.legend(fontsize=8)
    return path
