"""What an evaluation found, drawn: the number of integration steps, returns, and success task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from flowpolicy.plots.figure import BLUE, GREY, KEYS, LABELS, ORANGE, house_figure


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
    mean_key, interval_key = KEYS[metric]
    ordered = sorted(sweep, key=lambda row: int(row["num_steps"]))
    steps = np.array([row["num_steps"] for row in ordered], dtype=float)
    means = np.array([row[mean_key] for row in ordered], dtype=float)
    intervals = np.array([row[interval_key] for row in ordered], dtype=float)
    cost = np.array([row["ms_per_chunk"] for row in ordered], dtype=float)
    counts = sorted({int(row["episodes"]) for row in ordered})
    with house_figure(path, columns=2, width=9.2, height=3.6) as (figure, (left, right)):
        spans = np.nan_to_num(np.abs(intervals - means[:, None]).T)
        left.errorbar(steps, means, yerr=spans, color=BLUE, marker="o", ms=5, capsize=4, elinewidth=1.4)
        if demo_mean is not None:
            left.axhline(demo_mean, color=GREY, ls="--", lw=1.4, label=f"demonstrations, {demo_mean:.4g}")
            left.legend()
        left.set_ylim(bottom=0 if metric != "return" or means.min() > 0 else None)
        episodes = " to ".join(str(count) for count in {counts[0]: 0, counts[-1]: 0})
        left.set_title(f"{LABELS[metric].capitalize()}, mean and 95% interval, n = {episodes}")
        left.set_ylabel(LABELS[metric])
        right.plot(steps, cost, color=ORANGE, marker="s", ms=5)
        right.set_title("Planning one chunk alone, median")
        right.set_ylabel("milliseconds")
        right.set_ylim(bottom=0)
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_xticks(steps, [f"{step:g}" for step in steps])
            axis.minorticks_off()
            axis.set_xlabel("integration steps K")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
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
    theirs = None if demo_returns is None else np.asarray(demo_returns, dtype=float)
    pooled = ours if theirs is None else np.concatenate([ours, theirs])
    edges = np.linspace(pooled.min(), pooled.max() + 1e-9 + 1e-6 * abs(pooled.max()), 31)
    with house_figure(path, columns=1, width=6.4, height=3.6) as (_, (axis,)):
        share = {"bins": edges, "density": True}
        if theirs is not None:
            name = f"demonstrations, n = {theirs.size}, mean {theirs.mean():.4g}"
            axis.hist(theirs, color=GREY, alpha=0.35, label=name, **share)
            demo_mean = float(theirs.mean())
            axis.axvline(demo_mean, color=GREY, ls="--", lw=1.4, ymax=0.78)
        elif demo_mean is not None:
            axis.axvline(
                demo_mean, color=GREY, ls="--", lw=1.4, label=f"demonstrations, mean {demo_mean:.4g}"
            )
        name = f"policy, n = {ours.size}, mean {ours.mean():.4g}"
        if interval is not None and np.isfinite(interval).all():
            name += f" [{interval[0]:.4g}, {interval[1]:.4g}]"
            axis.axvspan(interval[0], interval[1], ymax=0.78, color=BLUE, alpha=0.18, lw=0)
        axis.hist(ours, color=BLUE, histtype="stepfilled", alpha=0.55, label=name, **share)
        axis.axvline(ours.mean(), color=BLUE, lw=1.6, ymax=0.78)
        axis.set_xlabel(f"{label} of an episode")
        axis.set_ylabel("density of episodes")
        axis.set_title(title or f"Episode {label}, mean with 95% interval")
        top = axis.get_ylim()[1]
        axis.set_ylim(0, 1.28 * top)  # room for the legend above the bars
        axis.legend(loc="upper left")
    return Path(path)


def plot_tasks(by_task: Mapping[str, Mapping[str, Any]], path: Path | str, *, title: str = "") -> Path:
    """Draw the success rate of each of several tasks, with its 95% interval (Wilson).

    Args:
        by_task: ``EvaluationResult.metrics()["by_task"]``, of tasks with a success rate.
        path: image file; the suffix chooses the format.
        title: over the figure.
    """
    names = list(by_task)
    rates = np.array([by_task[name]["success_rate"] for name in names])
    ends = np.array([by_task[name]["success_ci95"] for name in names])
    places = np.arange(len(names))
    height = 1.3 + 0.34 * len(names)
    with house_figure(path, columns=1, width=6.4, height=height) as (_, (axis,)):
        axis.barh(places, rates, color=BLUE, alpha=0.55, height=0.6)
        spans = np.abs(ends - rates[:, None]).T
        axis.errorbar(rates, places, xerr=spans, fmt="none", ecolor=BLUE, capsize=3, elinewidth=1.4)
        axis.axvline(rates.mean(), color=ORANGE, lw=1.4, label=f"mean of the tasks, {rates.mean():.2f}")
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel("success rate, 95% interval")
        axis.set_title(title)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3))
    return Path(path)
