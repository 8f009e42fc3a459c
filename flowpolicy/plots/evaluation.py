"""Plots of an evaluation: the number of integration steps, returns, and success task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from flowpolicy.evaluation.result import METRICS
from flowpolicy.plots.figure import (
    BLUE,
    GREY,
    LABELS,
    ORANGE,
    house_figure,
    points_with_intervals,
    reference_line,
)


def plot_k_sweep(
    sweep: Sequence[Mapping[str, Any]],
    path: Path | str,
    *,
    title: str = "",
    metric: str = "return",
    demo_mean: float | None = None,
) -> Path:
    """Draw a metric and the cost of a chunk against the number of integration steps K.

    Args:
        sweep: one mapping per K: ``num_steps`` and the entries of ``EvaluationResult.metrics()``.
        path: image file; the suffix chooses the format.
        title: over the figure.
        metric: return, success or score.
        demo_mean: the demonstrations' mean of it, a dashed line.
    """
    ordered = sorted(sweep, key=lambda row: int(row["num_steps"]))
    steps, means, intervals, cost = (
        np.array([row[key] for row in ordered], dtype=float)
        for key in ("num_steps", *METRICS[metric], "ms_per_chunk")
    )
    counts = sorted({int(row["episodes"]) for row in ordered})
    episodes = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    with house_figure(path, columns=2, width=9.2, height=3.6, title=title) as (_, (left, right)):
        points_with_intervals(left, steps, means, intervals, color=BLUE)
        reference_line(left, demo_mean, "demonstrations")
        if demo_mean is not None:
            left.legend()
        left.set(
            title=f"{LABELS[metric].capitalize()}, mean and 95% interval, n = {episodes}",
            ylabel=LABELS[metric],
            ylim=(0 if metric != "return" or means.min() > 0 else None, None),
        )
        right.plot(steps, cost, color=ORANGE, marker="s", ms=5)
        right.set(title="Sampling one chunk alone, median", ylabel="milliseconds", ylim=(0, None))
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_xticks(steps, [f"{step:g}" for step in steps])
            axis.minorticks_off()
            axis.set_xlabel("integration steps K")
    return Path(path)


def plot_returns(
    returns: ArrayLike,
    path: Path | str,
    *,
    demo_returns: ArrayLike | None = None,
    demo_mean: float | None = None,
    interval: Sequence[float] | None = None,
    title: str = "",
    label: str = "return",
) -> Path:
    """Draw the histogram of a policy's returns over those of the demonstrations.

    Args:
        returns: (n,) one number per episode.
        path: image file; the suffix chooses the format.
        demo_returns: (m,) the demonstrations', as a second histogram (both are scaled to area 1).
        demo_mean: their mean, a dashed line; taken from ``demo_returns`` where those are given.
        interval: 95% interval of the policy's mean, shaded.
        title: over the figure.
        label: what the numbers are.
    """
    ours = np.asarray(returns, dtype=float)
    theirs = np.asarray([] if demo_returns is None else demo_returns, dtype=float)
    pooled = np.concatenate([ours, theirs])
    edges = np.linspace(pooled.min(), pooled.max() + 1e-9 + 1e-6 * abs(pooled.max()), 31)
    top = 0.78  # of the lines: the legend is above the bars
    with house_figure(path, columns=1, width=6.4, height=3.6) as (_, (axis,)):
        if theirs.size:
            demo_mean = float(theirs.mean())
            name = f"demonstrations, n = {theirs.size}, mean {demo_mean:.4g}"
            axis.hist(theirs, edges, density=True, color=GREY, alpha=0.35, label=name)
        if demo_mean is not None:
            name = "" if theirs.size else f"demonstrations, mean {demo_mean:.4g}"
            axis.axvline(demo_mean, color=GREY, ls="--", lw=1.4, ymax=top, label=name or None)
        name = f"policy, n = {ours.size}, mean {ours.mean():.4g}"
        if interval is not None and np.isfinite(interval).all():
            name += f" [{interval[0]:.4g}, {interval[1]:.4g}]"
            axis.axvspan(interval[0], interval[1], ymax=top, color=BLUE, alpha=0.18, lw=0)
        axis.hist(ours, edges, density=True, color=BLUE, histtype="stepfilled", alpha=0.55, label=name)
        axis.axvline(ours.mean(), color=BLUE, lw=1.6, ymax=top)
        axis.set(xlabel=f"{label} of an episode", ylabel="density of episodes")
        axis.set(title=title or f"Episode {label}, mean with 95% interval")
        axis.set_ylim(0, axis.get_ylim()[1] / top)
        axis.legend(loc="upper left")
    return Path(path)


def plot_tasks(by_task: Mapping[str, Mapping[str, Any]], path: Path | str, *, title: str = "") -> Path:
    """Draw the success rate of each of several tasks, with its 95% interval (Wilson).

    Args:
        by_task: ``EvaluationResult.metrics()["by_task"]``, of tasks with a success rate.
        path: image file; the suffix chooses the format.
        title: over the figure.
    """
    rates = np.array([row["success_rate"] for row in by_task.values()])
    ends = np.array([row["success_ci95"] for row in by_task.values()])
    places = np.arange(len(rates))
    with house_figure(path, columns=1, width=6.4, height=1.3 + 0.34 * len(rates)) as (figure, (axis,)):
        axis.barh(places, rates, color=BLUE, alpha=0.55, height=0.6)
        spans = np.abs(ends - rates[:, None]).T
        axis.errorbar(rates, places, xerr=spans, fmt="none", ecolor=BLUE, capsize=3, elinewidth=1.4)
        axis.axvline(rates.mean(), color=ORANGE, lw=1.4, label=f"mean of the tasks, {rates.mean():.2f}")
        axis.set_yticks(places, list(by_task))
        axis.invert_yaxis()
        axis.set(xlim=(0, 1), xlabel="success rate, 95% interval", title=title)
        figure.legend(loc="outside lower right")
    return Path(path)
