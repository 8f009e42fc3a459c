"""Curves of pretraining and of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.result import METRICS
from flowpolicy.evaluation.statistics import seeds_interval
from flowpolicy.plots.figure import (
    BLUE,
    GREEN,
    GREY,
    LABELS,
    ORANGE,
    count_steps,
    house_figure,
    points_with_intervals,
    reference_line,
)

Rows = Sequence[Mapping[str, float]]


def plot_learning_curves(
    rows: Rows, path: Path | str, *, title: str = "", metric: str = "return", demo_mean: float | None = None
) -> Path:
    """Draw a pretraining run; panels without numbers are left out.

    Args:
        rows: of ``metrics.csv``: ``step`` and any of ``loss/total``, ``validation/loss``,
            ``validation/action_error``, ``evaluation/<metric>`` with ``_low`` and ``_high`` (its interval).
        path: image file; the suffix chooses the format.
        title: over the figure.
        metric: which of return, success and score the evaluation panel shows.
        demo_mean: the demonstrations' mean of it, a dashed line.

    Raises:
        ConfigError: when no row holds anything to draw.
    """
    evaluation = f"evaluation/{metric}"
    panels = {
        "Loss": {"loss/total": "training", "validation/loss": "held-out episodes"},
        "Open-loop action error": {"validation/action_error": "held-out episodes"},
        f"Evaluation {LABELS[metric]}": {evaluation: "policy"},
    }
    shown = {name: keys for name, keys in panels.items() if any(key in row for row in rows for key in keys)}
    if not shown:
        raise ConfigError(
            f"There is nothing to draw in {path}: no losses, errors or evaluations were logged."
        )
    with house_figure(path, columns=len(shown), width=4.6 * len(shown), height=3.4, title=title) as (_, axes):
        for axis, (name, keys) in zip(axes, shown.items(), strict=True):
            for key, label in keys.items():
                steps, values = _series(rows, key)
                if steps.size:
                    axis.plot(steps, values, label=label, marker="o" if steps.size < 15 else None, ms=4)
            axis.set_title(name)
            count_steps(axis, "optimiser steps")
            if name == "Loss":
                axis.set_yscale("log")
            elif evaluation in keys:
                _draw_interval(axis, rows, evaluation)
                reference_line(axis, demo_mean, "demonstrations")
            else:
                axis.set(ylabel="RMS error, normalised units", ylim=(0, None))
                continue
            axis.legend()
    return Path(path)


def plot_finetuning(
    rows: Rows,
    path: Path | str,
    *,
    title: str = "",
    metric: str = "return",
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> Path:
    """Draw a fine-tuning run: how well the policy does, how far an iteration moves it, and its noise.

    Args:
        rows: of ``metrics.csv``: ``step`` in environment steps, and metrics of ``rollout/``, ``evaluation/``
            and ``train/``.
        path: image file; the suffix chooses the format.
        title: over the figure.
        metric: ``success`` puts the success rate before the return.
        before: ``EvaluationResult.metrics()`` of the pretrained policy.
        after: of the tuned one.
    """
    shown = ("success", "return") if metric == "success" else ("return",)
    columns = len(shown) + 2
    with house_figure(path, columns=columns, width=4.6 * columns, height=3.4, title=title) as (_, axes):
        for axis, name in zip(axes, shown, strict=False):
            _draw_performance(axis, rows, name, before, after)
        distance, noise = axes[-2:]
        _draw_series(distance, rows, "train/kl_last", BLUE, "KL of an iteration, nats a chunk")
        _draw_series(distance, rows, "train/clip_fraction", ORANGE, "share of clipped ratios")
        distance.set(title="How far an iteration moves", ylim=(0, 1.35 * distance.get_ylim()[1]))
        _draw_series(noise, rows, "train/noise_std", GREEN, "noise, normalised units")
        _draw_series(noise, rows, "train/explained_variance", GREY, "critic's explained variance")
        noise.set(title="Noise and critic", ylim=(0, 1.35))
        for axis in axes:
            count_steps(axis, "environment steps")
            axis.legend(fontsize=9, loc="upper left" if axis in (distance, noise) else "best")
    return Path(path)


def plot_finetuning_bands(
    curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]],
    path: Path | str,
    *,
    bases: Mapping[str, float],
    metric: str = "return",
) -> Path:
    """Draw learning curves of several runs, a panel each: every seed, their mean, and its 95% band.

    Args:
        curves: label -> one mapping per seed with ``step`` and ``evaluation/<metric>``.
        path: image file; the suffix chooses the format.
        bases: label -> the pretrained policy's figure.
        metric: return or success.
    """
    with house_figure(path, columns=len(curves), width=5.2 * len(curves), height=3.6) as (_, axes):
        for axis, (label, seeds) in zip(axes, curves.items(), strict=True):
            for seed in seeds:
                axis.plot(seed["step"], seed[f"evaluation/{metric}"], color=BLUE, lw=0.8, alpha=0.5)
            shortest = min(len(seed["step"]) for seed in seeds)
            steps = np.mean([seed["step"][:shortest] for seed in seeds], axis=0)
            values = np.array([seed[f"evaluation/{metric}"][:shortest] for seed in seeds])
            label_of_mean = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
            axis.plot(steps, values.mean(axis=0), color=BLUE, label=label_of_mean)
            if len(seeds) > 2:
                low, high = np.transpose([seeds_interval(column) for column in values.T])
                label_of_band = "95% interval of the mean (t)"
                axis.fill_between(steps, low, high, color=BLUE, alpha=0.15, lw=0, label=label_of_band)
            reference_line(axis, bases[label], "pretrained")
            axis.set(ylim=(0, None), title=f"{label}: {LABELS[metric]} as deployed")
            count_steps(axis, "environment steps")
            axis.legend(loc="lower right")
    return Path(path)


def _draw_performance(
    axis: Any, rows: Rows, name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> None:
    _draw_series(axis, rows, f"rollout/{name}", BLUE, "while exploring, with noise")
    mean_key, _ = METRICS[name]
    reference_line(axis, None if before is None else before[mean_key], "pretrained")
    key = f"evaluation/{name}"
    points = [row for row in rows if key in row]
    if points:
        steps, means, low, high = (
            np.array([row[name] for row in points]) for name in ("step", key, f"{key}_low", f"{key}_high")
        )
        result = "95% interval" if after is None else f"{after[mean_key]:.4g} at the end"
        ends = np.stack([low, high], axis=1)
        points_with_intervals(axis, steps, means, ends, color=ORANGE, label=f"as deployed, {result}")
    axis.set(title=LABELS[name].capitalize(), ylim=(0 if name == "success" else None, None))


def _draw_interval(axis: Any, rows: Rows, key: str) -> None:
    """Shade the interval around the line that ``axis`` has, where every point has one."""
    steps, _ = _series(rows, key)
    (with_low, low), (with_high, high) = _series(rows, f"{key}_low"), _series(rows, f"{key}_high")
    if steps.size and np.array_equal(with_low, steps) and np.array_equal(with_high, steps):
        axis.fill_between(steps, low, high, alpha=0.2, lw=0, label="95% interval")
    _, episodes = _series(rows, "evaluation/episodes")
    if episodes.size:
        axis.set_title(f"{axis.get_title(loc='left')}, n = {episodes[-1]:g}")


def _draw_series(axis: Any, rows: Rows, key: str, color: str, label: str) -> None:
    axis.plot(*_series(rows, key), color=color, label=label, lw=1.2)


def _series(rows: Rows, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """The steps at which ``key`` was logged as a finite number, and the numbers."""
    found = [(row["step"], row[key]) for row in rows if key in row and np.isfinite(row[key])]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return steps, values
