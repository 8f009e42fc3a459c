"""Predicted over recorded actions, and how the errors of a prediction are spread."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from flowpolicy.evaluation.open_loop import HOLD, METHODS, NEAREST, POLICY, OpenLoopResult
from flowpolicy.plots.figure import BLUE, GREEN, GREY, ORANGE, house_figure

MOST_DIMENSIONS = 12
"""Panels of trajectories; of more dimensions the first ones are drawn."""
_COLORS = {POLICY: BLUE, HOLD: ORANGE, NEAREST: GREEN}


def plot_trajectories(
    result: OpenLoopResult, path: Path | str, *, control_hz: float, title: str = ""
) -> Path:
    """One held-out episode, a panel for each dimension: what was recorded, and each predicted chunk.

    The part of a chunk that a robot would execute is drawn in full, the rest pale.
    """
    shown = result.trajectory
    count = min(len(result.names), MOST_DIMENSIONS)
    columns = min(3, count)
    rows = math.ceil(count / columns)
    horizon = shown.predicted.shape[1]
    more = f"; {count} of {len(result.names)} dimensions" if count < len(result.names) else ""
    with house_figure(
        path, columns=columns, rows=rows, width=4.2 * columns, height=0.7 + 2.0 * rows,
        title=f"{title}, open loop on held-out episode {shown.episode}{more}",
    ) as (figure, axes):  # fmt: skip
        for axis in axes[count:]:
            axis.set_axis_off()
        for dimension, axis in zip(range(count), axes, strict=False):
            axis.plot(np.arange(len(shown.recorded)) / control_hz, shown.recorded[:, dimension], color=GREY)
            for start, chunk in zip(shown.starts, shown.predicted[:, :, dimension], strict=True):
                seconds = (start + np.arange(horizon)) / control_hz
                executed = slice(0, shown.execute_horizon)
                axis.plot(seconds, chunk, color=BLUE, lw=0.6, alpha=0.3)
                axis.plot(seconds[executed], chunk[executed], color=BLUE, lw=1.4)
            name = result.names[dimension]
            axis.set_title(f"dimension {name}" if name.isdigit() else name)
            axis.set_xlim(0, len(shown.recorded) / control_hz)
        for axis in axes[max(0, count - columns) : count]:
            axis.set_xlabel("seconds")
        lines = axes[0].lines
        if len(lines) > 2:
            figure.legend(
                [lines[0], lines[2], lines[1]], ["recorded", "predicted, up to T_e", "beyond it"],
                loc="outside lower center", ncols=3, fontsize=9,
            )  # fmt: skip
    return Path(path)


def plot_errors(result: OpenLoopResult, path: Path | str, *, control_hz: float, title: str = "") -> Path:
    """The policy beside both baselines: errors over the steps of a chunk, and of each dimension."""
    count = len(result.names)
    width = 4.6 + max(4.6, 0.45 * count)
    with house_figure(path, columns=2, width=width, height=3.6, title=title) as (figure, (steps, bars)):
        steps.get_gridspec().set_width_ratios([4.6, width - 4.6])
        at = np.arange(count)
        seconds = np.arange(1, result.counts.shape[1] + 1) / control_hz
        for number, (method, label) in enumerate(METHODS.items()):
            marker = "o" if len(seconds) < 15 else None
            steps.plot(seconds, result.by_step(method), color=_COLORS[method], marker=marker, ms=4)
            heights = result.by_dimension(method) * result.inverse_scale
            bars.bar(at + 0.27 * (number - 1), heights, 0.25, color=_COLORS[method], label=label)
        executed = result.trajectory.execute_horizon / control_hz
        steps.axvline(executed, color=GREY, lw=1.0, ls=":")
        steps.set(xlabel="seconds into the chunk; dotted: executed up to here", ylim=(0, None))
        steps.set(ylabel="RMS error, normalised units", title="Over the chunk")
        slant = {"rotation": 45, "ha": "right"} if count > 6 else {}
        bars.set_xticks(at, result.names, **slant)
        bars.set(xlabel="dimension of the action", title="By dimension", ylim=(0, None))
        bars.grid(visible=False, axis="x")
        handles, labels = bars.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    return Path(path)
