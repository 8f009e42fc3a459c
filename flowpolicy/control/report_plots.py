"""The pictures of a control run's report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.statistics import Columns, actions_of
from flowpolicy.control.telemetry import SOURCES
from flowpolicy.evaluation.plots import BLUE, GREEN, GREY, ORANGE, house_figure

SOURCE_COLORS = {"chunk": BLUE, "previous": GREEN, "fast": "#E69F00", "safe": ORANGE}
POINTS = 3000
"""Most points along a line: more than a screen has."""
WINDOW_S = 4.0
LINES = 6


def plot_timing(columns: Columns, period: float, path: Path) -> None:
    """Lateness and work of every tick, and how often which lateness occurs."""
    seconds = columns["deadline"] - columns["deadline"][0]
    late = 1e3 * (columns["started"] - columns["deadline"])
    work = 1e3 * (columns["finished"] - columns["started"])
    with house_figure(path, columns=2, width=10.0, height=3.0) as (_, (over_time, histogram)):
        for values, color, label in (
            (late, BLUE, "start after the deadline"),
            (work, ORANGE, "start to command"),
        ):
            x, y = _peaks(seconds, np.maximum(values, 1e-3))
            over_time.plot(x, y, color=color, lw=0.8, label=label)
        over_time.axhline(1e3 * period, color=GREY, lw=0.8, ls=":")
        over_time.set(yscale="log", xlabel="seconds", ylabel="ms", title="Ticks")
        over_time.legend(loc="upper right", fontsize=8)
        bins = np.geomspace(1e-3, max(1e2, late.max() * 1.1), 60)
        histogram.hist(np.maximum(late, 1e-3), bins=list(bins), color=BLUE)
        histogram.axvline(1e3 * period, color=GREY, lw=0.8, ls=":")
        histogram.set(
            xscale="log", yscale="log", xlabel="ms after the deadline", ylabel="ticks", title="Lateness"
        )


def plot_inference(columns: Columns, path: Path) -> None:
    """Planning time, delay in ticks and age of the observations."""
    seconds = columns["deadline"] - columns["deadline"][0]
    arrived = columns["delay"] >= 0
    with house_figure(path, columns=3, width=10.0, height=2.8) as (_, (planning, delays, age)):
        x, y = _peaks(seconds[arrived], 1e3 * columns["inference"][arrived])
        planning.plot(x, y, ".", ms=2, color=BLUE)
        planning.set(xlabel="seconds", ylabel="ms", title="Planning a chunk")
        values, counts = np.unique(columns["delay"][arrived], return_counts=True)
        delays.bar(values, counts, color=BLUE)
        delays.set(xlabel="ticks", ylabel="chunks", title="Delay")
        delays.locator_params(axis="x", integer=True)
        known = np.isfinite(columns["observation_age"])
        x, y = _peaks(seconds[known], 1e3 * columns["observation_age"][known])
        age.plot(x, y, color=BLUE, lw=0.8)
        age.set(xlabel="seconds", ylabel="ms", title="Age of the observation")


def plot_actions(columns: Columns, path: Path) -> None:
    """Where actions came from over the whole run, and the last seconds of the commands."""
    seconds = columns["deadline"] - columns["deadline"][0]
    with house_figure(path, columns=1, rows=2, width=10.0, height=4.6) as (_, (strip, commands)):
        edges = np.linspace(0, seconds[-1] + 1e-9, min(200, len(seconds)) + 1)
        total = np.maximum(np.histogram(seconds, edges)[0], 1)
        bottom: NDArray[np.float64] = np.zeros(len(edges) - 1)
        for name in SOURCES:
            share = np.histogram(seconds[columns["source"] == name], edges)[0] / total
            strip.bar(
                edges[:-1],
                share,
                np.diff(edges),
                bottom=bottom,
                align="edge",
                color=SOURCE_COLORS[name],
                label=name,
            )
            bottom += share
        strip.set(
            ylim=(0, 1), xlim=(0, edges[-1]), xlabel="seconds", ylabel="share", title="Source of the action"
        )
        strip.legend(loc="lower center", bbox_to_anchor=(0.7, 1.0), ncols=4, fontsize=8)
        window = seconds >= seconds[-1] - WINDOW_S
        actions = actions_of(columns)[window]
        for dimension in range(min(LINES, actions.shape[1])):
            commands.plot(seconds[window], actions[:, dimension], lw=1.0, label=f"{dimension}")
        chunk = columns["chunk"][window]
        for at in seconds[window][1:][np.diff(chunk) != 0]:
            commands.axvline(at, color=GREY, lw=0.3, alpha=0.5)
        shown = f", {LINES} of {actions.shape[1]} dimensions" if actions.shape[1] > LINES else ""
        commands.set(xlabel="seconds", ylabel="command", title=f"The last {WINDOW_S:g} seconds{shown}")
        commands.legend(loc="upper right", fontsize=7, ncols=LINES)


def _peaks(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The series with at most :data:`POINTS` points: of each stretch its largest value."""
    stride = -(-len(x) // POINTS)
    if stride <= 1:
        return x, y
    starts = np.arange(0, len(x), stride)
    return x[starts], np.maximum.reduceat(y, starts)
