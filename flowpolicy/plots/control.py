"""The plots of a control run's report, reduced to screen resolution for runs of any length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.events import Event, name_of
from flowpolicy.control.statistics import Columns, actions_of, changes_of
from flowpolicy.control.telemetry import SOURCES
from flowpolicy.plots.figure import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    PINK,
    house_figure,
    plain_log_ticks,
    say,
)

Numbers = NDArray[np.float64]

SOURCE_COLORS = {"chunk": BLUE, "previous": GREEN, "fast": AMBER, "safe": ORANGE, "operator": PINK}
BINS = 500
"""Stretches that a long series is cut into; of each its median, or mean, and its span are drawn."""
WINDOW_S = 4.0
"""Length of the part of a run that is drawn tick by tick."""
FLOOR_MS = 1e-3
"""What is shorter is drawn as this long, for the logarithm."""


def plot_timing(columns: Columns, period: float, path: Path) -> Path:
    """Lateness and work of every tick, and how often which lateness occurs."""
    seconds = seconds_of(columns, period)
    late = np.maximum(1e3 * (columns["started"] - columns["deadline"]), FLOOR_MS)
    work = np.maximum(1e3 * (columns["finished"] - columns["started"]), FLOOR_MS)
    with house_figure(path, columns=2, width=10.0, height=3.0) as (_, (over_time, histogram)):
        _series(over_time, seconds, work, ORANGE, "start to command sent")
        _series(over_time, seconds, late, BLUE, "start after deadline")
        over_time.axhline(1e3 * period, color=GREY, lw=1.0, ls=":")
        over_time.set(xlim=_span(seconds), xlabel="seconds", ylabel="ms", title="Ticks; dotted: one period")
        over_time.set(yscale="log", ylim=(None, 4 * max(1e3 * period, late.max(), work.max())))
        over_time.legend(loc="upper right", fontsize=8, ncols=2)
        bins = np.geomspace(late.min() / 1.5, 1.5 * max(1e3 * period, late.max()), 60)
        histogram.hist(late, bins=list(bins), histtype="stepfilled", color=BLUE)
        histogram.axvline(1e3 * period, color=GREY, lw=1.0, ls=":")
        histogram.set(xscale="log", yscale="log", xlabel="ms after the deadline", ylabel="ticks")
        histogram.set(ylim=(0.7, None), title="How late ticks start; dotted: one period")
        histogram.tick_params(axis="y", which="minor", labelleft=False)
        plain_log_ticks(histogram)
    return path


def plot_inference(columns: Columns, period: float, path: Path) -> Path:
    """Sampling time and delay of every chunk, age of the observations, and changes of the command."""
    seconds = seconds_of(columns, period)
    arrived = columns["delay"] >= 0
    with house_figure(path, columns=2, rows=2, width=10.0, height=5.2) as (_, panels):
        sampling, delay, age, seams = panels
        _series(sampling, seconds[arrived], 1e3 * columns["inference"][arrived], BLUE, marker=".")
        sampling.set(xlabel="seconds", ylabel="ms", title="Sampling a chunk", ylim=(0, None))
        _series(delay, seconds[arrived], columns["delay"][arrived], BLUE, marker=".")
        delay.set(xlabel="seconds", ylabel="actions", title="Delay: from observation to first use")
        delay.set_ylim(-0.3, max(columns["delay"].max(), 1) + 0.3)
        delay.locator_params(axis="y", integer=True)
        known = np.isfinite(columns["observation_age"])
        _series(age, seconds[known], 1e3 * columns["observation_age"][known], BLUE)
        age.set(xlabel="seconds", ylabel="ms", title="Age of the observation at a tick", ylim=(0, None))
        _seams(seams, columns)
        for axis in (sampling, delay, age):
            axis.set_xlim(*_span(seconds))
    return path


def plot_run(columns: Columns, period: float, path: Path) -> Path:
    """The whole run: where actions came from, which events occurred when, and the commands."""
    seconds, actions = seconds_of(columns, period), actions_of(columns)
    with _over_time(path, seconds, columns["events"], [1.0, 2.2]) as (sources, commands):
        _sources(sources, seconds, columns["source"], period)
        for dimension, color in zip(range(actions.shape[1]), PALETTE, strict=False):
            known = np.isfinite(actions[:, dimension])
            values = actions[known, dimension]
            _series(commands, seconds[known], values, color, f"{dimension}", middle=np.mean, shade=0.15)
        _label_commands(commands, actions, "Commands")
    return path


def plot_window(columns: Columns, period: float, path: Path) -> Path:
    """The seconds with most events tick by tick: commands, changes of chunk, and the events."""
    seconds = seconds_of(columns, period)
    first = busiest(seconds, columns["events"])
    inside = (seconds >= first) & (seconds <= first + WINDOW_S)
    is_all = bool(inside.all())
    seconds, events, chunk = seconds[inside], columns["events"][inside], columns["chunk"][inside]
    actions = actions_of(columns)[inside]
    with _over_time(path, seconds, events, [2.4]) as (commands,):
        for dimension, color in zip(range(actions.shape[1]), PALETTE, strict=False):
            style = {"color": color, "label": f"{dimension}", "marker": "." if len(seconds) == 1 else None}
            commands.step(seconds, actions[:, dimension], where="post", lw=1.2, **style)
        for at in seconds[1:][np.diff(chunk) != 0]:
            commands.axvline(at, color=GREY, lw=0.6, ls=":", zorder=0)
        part = (
            "tick by tick"
            if is_all
            else f"of {WINDOW_S:g} seconds" + " with most events" * bool(events.any())
        )
        _label_commands(commands, actions, f"Commands {part}; dotted: change of chunk")
    return path


@contextlib.contextmanager
def _over_time(
    path: Path, seconds: Numbers, events: NDArray[Any], heights: list[float]
) -> Iterator[list[Any]]:
    """Panels of these heights over one axis of time, and the events below them, where there are any."""
    kinds = _kinds(events)
    rows = [*heights, 0.25 * len(kinds) + 0.15] if kinds else heights
    height = 0.4 + 0.5 * len(heights) + sum(rows)
    with house_figure(path, columns=1, rows=len(rows), width=10.0, height=height) as (_, axes):
        axes[0].get_gridspec().set_height_ratios(rows)
        yield list(axes[: len(heights)])
        if kinds:
            _raster(axes[-1], seconds, events, kinds)
        for axis in axes:
            axis.set_xlim(*_span(seconds))


def seconds_of(columns: Columns, period: float) -> Numbers:
    """Time of every row since the start of the run, counted in ticks: it never steps as a clock may."""
    return np.asarray(columns["tick"] * period, dtype=np.float64)


def _series(
    axis: Any,
    x: Numbers,
    y: NDArray[Any],
    color: str,
    label: str = "",
    *,
    marker: str = "",
    middle: Any = np.median,
    shade: float = 0.3,
) -> None:
    """A short series as it is; a long one as the middle and the span of each stretch of it."""
    if len(x) == 0:
        say(axis, "none")
        return
    style = {"color": color, "label": label or None}
    if len(x) <= 2 * BINS:
        alone = "." if len(x) == 1 else ""
        axis.plot(x, y, marker or alone, ms=3, lw=1.0, **style)
        return
    parts = np.array_split(np.arange(len(x)), BINS)
    at = np.array([x[part[0]] for part in parts])
    low, high = (np.array([reduce(y[part]) for part in parts]) for reduce in (np.min, np.max))
    axis.fill_between(at, low, high, color=color, alpha=shade, lw=0.4)
    axis.plot(at, [middle(y[part]) for part in parts], lw=1.0, **style)


def _seams(axis: Any, columns: Columns) -> None:
    """How often the command changes by how much, where the chunk changes and elsewhere."""
    size, is_seam = changes_of(columns)
    axis.set(xlabel="root mean square, in ranges of the command", ylabel="share")
    axis.set_title("Change of the command from tick to tick")
    if not len(size):
        say(axis, "none")
        return
    bins = list(np.linspace(0.0, max(float(np.quantile(size, 0.995)), 1e-6), 40))
    for values, color, label in (size[~is_seam], BLUE, "inside chunks"), (size[is_seam], ORANGE, "at seams"):
        if len(values):
            shares = np.full(len(values), 1 / len(values))
            clipped = np.minimum(values, bins[-1])
            axis.hist(clipped, bins, weights=shares, histtype="step", lw=1.6, color=color, label=label)
    axis.set_ylim(top=1.2 * axis.get_ylim()[1])
    axis.legend(loc="upper right", fontsize=8, ncols=2)


def _sources(axis: Any, seconds: Numbers, source: NDArray[Any], period: float) -> None:
    ticks = round((seconds[-1] - seconds[0]) / period) + 1
    edges = seconds[0] - period / 2 + np.linspace(0, ticks * period, min(200, ticks) + 1)  # between ticks
    total = np.maximum(np.histogram(seconds, edges)[0], 1)
    bottom: Numbers = np.zeros(len(edges))
    for name in SOURCES:
        share = np.histogram(seconds[source == name], edges)[0] / total
        top = bottom + np.append(share, share[-1])
        axis.fill_between(edges, bottom, top, step="post", color=SOURCE_COLORS[name], lw=0, label=name)
        bottom = top
    axis.set(ylim=(0, 1), ylabel="share", title="Where commands came from")
    _legend_beside(axis)


def _raster(axis: Any, seconds: Numbers, bits: NDArray[Any], kinds: list[Event]) -> None:
    """A row for every kind of event, a mark for every tick, or stretch of a long run, with it."""
    grain = max((seconds[-1] - seconds[0]) / 1000, 1e-9)
    for row, event in enumerate(kinds):
        at = seconds[(bits >> event) & 1 == 1]
        at = seconds[0] + grain * np.unique(np.floor((at - seconds[0]) / grain))
        color = SOURCE_COLORS["safe"] if event == Event.SAFE_ACTION else GREY
        axis.plot(at, np.full(len(at), row), "|", ms=9, mew=1.2, color=color, clip_on=False)
    axis.set_yticks(range(len(kinds)), [name_of(event) for event in kinds], fontsize=8)
    axis.set(ylim=(len(kinds) - 0.4, -0.6))
    axis.set_title("Events")


def _kinds(bits: NDArray[Any]) -> list[Event]:
    seen = int(np.bitwise_or.reduce(bits)) if len(bits) else 0
    return [event for event in Event if seen >> event & 1]


def busiest(seconds: Numbers, bits: NDArray[Any]) -> float:
    """Where the window with most ticks with an event begins; the last one of several."""
    counts = np.concatenate([[0], np.cumsum(bits != 0)])
    ends = np.searchsorted(seconds, seconds + WINDOW_S, side="right")
    inside = counts[ends] - counts[:-1]
    last = max(seconds[-1] - WINDOW_S, seconds[0])
    if inside.max() == 0:
        return float(last)
    starts = np.flatnonzero(inside == inside.max())
    before = WINDOW_S / 20  # what led to the first of them
    return float(np.clip(seconds[starts[-1]] - before, seconds[0], last))


def _label_commands(axis: Any, actions: NDArray[Any], title: str) -> None:
    drawn, count = min(len(PALETTE), actions.shape[1]), actions.shape[1]
    axis.set(xlabel="seconds", title=title + (f"; {drawn} of {count} dimensions" if drawn < count else ""))
    if axis.lines:
        _legend_beside(axis, title="dimension", title_fontsize=8)


def _legend_beside(axis: Any, **style: Any) -> None:
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=8, **style)


def _span(seconds: Numbers) -> tuple[float, float]:
    """Limits of the time axis, also of a single tick."""
    return float(seconds[0]), float(max(seconds[-1], seconds[0] + 1e-3))
